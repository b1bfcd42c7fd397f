"""Decode steps that repeat without asking anybody: everything a record holds is as if each had been begun and completed."""

import random
from dataclasses import replace
from pathlib import Path

import pytest

from baselines.swap.request_level import RequestLevel
from runner.replay import Replay
from serving import registry
from serving.batching import StepLimits
from serving.cost.table1 import published_spec
from serving.interface import Cluster, Demand, Device, ServedModel
from serving.scheduler import StepScheduler
from serving.sequence import Sequence
from serving.sim.backend import simulate_card
from workloads.trace import TraceRequest

pytestmark = pytest.mark.cpu

NAMES = ("deepseek-v2-lite", "glm-4.7-flash", "qwen3-30b-a3b")
MODELS = [ServedModel(published_spec(name), Path("unused"), "bfloat16") for name in NAMES]
TOGETHER = {name: {"devices": [0, 1], "dp": 2} for name in NAMES}
ASIDE = {NAMES[0]: {"devices": [0, 1], "tp": 2}, NAMES[1]: {"devices": [2]}, NAMES[2]: {"devices": [2, 3], "tp": 2}}
CASES = {
    "elastic": ({}, 3, 140 << 30),
    "elastic in groups": ({"groups": TOGETHER}, 2, 80 << 30),
    "elastic, scarce": ({"groups": TOGETHER, "admission": "optimistic", "page_bytes": 1 << 16}, 2, 77208 << 20),
    "elastic, decode only": ({}, 2, 140 << 30),
    "elastic-placement": ({"idle_evict_s": 1.0}, 2, 140 << 30),
    "static in groups": ({"placement": "given", "groups": ASIDE}, 4, 140 << 30),
    "static": ({}, 3, 140 << 30),
    "quota": ({"adapt_every_s": 0.3}, 2, 140 << 30),
    "swap": ({}, 1, 80 << 30),
    "swap token": ({"mode": "token"}, 1, 80 << 30),
}


def serve(case):
    options, devices, memory_bytes = CASES[case]
    cluster = Cluster(tuple(Device(f"gpu:{i}", "cuda", i, memory_bytes, card="h200") for i in range(devices)))
    system = registry.create(case.split()[0].rstrip(","), {"page_bytes": 2 << 20, "max_batch": 4, **options})
    backend = simulate_card("h200", prefill="decode only" not in case)
    rng, now_s, requests, scarce = random.Random(5), 0.0, [], "scarce" in case
    for number in range(40):
        now_s += rng.expovariate(rng.choice((3.0, 30.0))) / (50 if scarce else 1)
        prompt, output = rng.choice((1, 40, 700, 3000)), rng.choice((1, 2, 30, 150)) * (4 if scarce else 1)
        requests.append(TraceRequest(number, rng.choice(NAMES), now_s, prompt, output, ()))
    system.start(system.plan(cluster, MODELS, Demand()), backend)
    try:
        seen = Replay(system, requests, 600.0, 0.002, backend.clock, lengths_only=True).run(0, "sim")
        return seen.requests, seen.pools, seen.devices, seen.duration_ns, system.notes()
    finally:
        system.stop()


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_otherwise_than_with_every_step_begun_and_completed(case, monkeypatch):
    repeated = []
    repeat = StepScheduler.repeat
    monkeypatch.setattr(StepScheduler, "repeat", lambda *args: repeated.append(args[2]) or repeat(*args))
    found = serve(case)
    assert all(row.outcome == "completed" for row in found[0])
    assert case != "elastic, scarce" or any(row.preemptions for row in found[0])
    if case != "swap token":  # whose turns have to be watched
        assert sum(repeated) > 100
    monkeypatch.setattr(StepScheduler, "repeats", lambda self, plan: 0)
    decide = RequestLevel.decide
    monkeypatch.setattr(RequestLevel, "decide", lambda policy, view: replace(decide(policy, view), settled=False))
    assert serve(case) == found


def scheduler(*outputs, **limits):
    made = StepScheduler(2, StepLimits(**{"max_batch": 4, "prefill_chunk": 64, **limits}))
    sequences = [Sequence(number, 0, [0] * 5, 5, output) for number, output in enumerate(outputs)]
    for sequence in sequences:
        made.add(sequence)
    return made, sequences


def finish(made, plan):
    return made.complete(plan, iter([0] * len(plan.logit_rows)))


def test_repeats_end_before_the_first_sequence_does():
    made, sequences = scheduler(9, 6)
    first = made.next_step()
    assert made.repeats(first) == 0  # prompts
    finish(made, first)
    plan = made.next_step()
    assert made.repeats(plan) == 4
    later = made.repeat(plan, 4, 0)
    assert later.starts == tuple(start + 4 for start in plan.starts)
    assert [last for _, _, last in finish(made, later)] == [False, True]
    assert [sequence.cached for sequence in sequences] == [10, 10] and len(sequences[0].tokens) == 11


@pytest.mark.parametrize("disturb", ["cancel", "newcomer", "stop id", "other model", "no room"])
def test_a_step_that_another_may_follow_does_not_repeat(disturb):
    made, sequences = scheduler(9, 9, **({"max_batch": 1} if disturb == "no room" else {}))
    finish(made, made.next_step())
    if disturb == "cancel":
        made.cancel(0, 0)
    elif disturb == "stop id":
        sequences[1].stop_ids = (7,)
    plan = made.next_step()
    if disturb in ("newcomer", "other model"):
        made.add(Sequence(7, int(disturb == "other model"), [0, 0], 2, 3))
    assert made.repeats(plan) == 0
