"""The event loop as machine code and as plain Python: the same nanoseconds, whatever runs."""

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.replay import Replay
from serving import registry
from serving.cost.table1 import published_spec
from serving.interface import Cluster, Demand, Device, ServedModel
from serving.sim.backend import simulate_card
from serving.sim.clock import VirtualClock
from serving.sim.costs import ALONE, Neighbourly
from serving.sim.pipeline import Pipeline, Step
from workloads.trace import TraceRequest

pytestmark = pytest.mark.cpu

MODELS = [
    ServedModel(published_spec(name), Path("unused"), "bfloat16")
    for name in ("qwen3-30b-a3b", "deepseek-v2-lite", "glm-4.7-flash")
]
CARDS = Cluster(tuple(Device(f"gpu:{i}", "cuda", i, 40 << 30, card="a100-40gb") for i in range(5)))


def trace(seconds, rate_rps, seed=0):
    rng, now_s, requests = random.Random(seed), 0.0, []
    while (now_s := now_s + rng.expovariate(rate_rps)) < seconds:
        model = rng.choice(MODELS).name
        requests.append(TraceRequest(len(requests), model, now_s, rng.randint(1, 900), rng.randint(1, 60), ()))
    return requests


def simulate(requests, compiled, prefill=True, **options):
    backend = simulate_card("a100-40gb", compiled, prefill)
    system = registry.create("crosspool", {"page_bytes": 2 << 20, "ffn_sharding": "tensor", "max_batch": 4, **options})
    system.start(system.plan(CARDS, MODELS, Demand()), backend)
    try:
        seen = Replay(system, requests, 60.0, 0.002, backend.clock, lengths_only=True).run(len(requests), "sim")
    finally:
        system.stop()
    return [row.token_times_ns for row in seen.requests], seen.devices, seen.pools


@pytest.mark.parametrize(
    "options",
    [{}, {"lanes": 3}, {"ffn_sharding": "layer"}, {"control": "host"}, {"ffn_sharding": "layer", "kv_share": 0.5}],
    ids=str,
)
def test_compiled_or_not_it_is_the_same_run(options):
    requests = trace(4, 4.0)
    compiled = simulate(requests, True, **options)
    assert compiled == simulate(requests, False, **options)
    assert compiled == simulate(requests, True, **options)


def test_prompts_that_come_with_their_kv_cost_no_prefill():
    requests = [TraceRequest(0, MODELS[0].name, 0.0, 900, 3, ())]
    whole, apart = (simulate(requests, True, prefill=prefill)[0][0] for prefill in (True, False))
    assert apart[0] < whole[0] / 2
    assert apart[2] - apart[1] == whole[2] - whole[1]


stage_ns = st.integers(1, 40)
steps = st.lists(st.tuples(stage_ns, stage_ns, stage_ns, st.integers(1, 60), st.integers(0, 3)), min_size=1, max_size=8)


def finished_at(shapes, lanes, compiled):
    clock = VirtualClock()
    pipeline, done, left = Pipeline(clock, compiled), [], list(reversed(shapes))
    workers = [pipeline.add_ffn(), pipeline.add_ffn()]

    def begin():
        if not left:
            return None
        attention_ns, ffn_ns, cross_ns, layers, dense = left.pop()
        route = pipeline.keep_route([0 if layer < dense else 1 + layer % 2 for layer in range(layers)])
        jobs = pipeline.keep_jobs(
            [[(workers[0], 3 * ffn_ns), (workers[1], ffn_ns)], [(workers[0], ffn_ns)], [(workers[1], ffn_ns + 1)]]
        )
        minds = Neighbourly(1.0 + attention_ns / 40, ffn_ns / 40) if ffn_ns % 2 else ALONE
        return Step(
            len(left), attention_ns + 2, attention_ns, 5, layers, cross_ns, 8, route, jobs, minds, minds
        )  # fmt: skip

    device = pipeline.add_attention(begin, lambda payload: done.append((payload, clock.now_ns())), lanes)
    pipeline.submit(device)
    clock.sleep(1e-3)
    return done, device.busy_ns, device.crossed_bytes, [(w.busy_ns, w.steps) for w in workers]


@settings(max_examples=150)
@given(steps, st.integers(1, 3))
def test_any_steps_end_at_the_same_nanosecond(shapes, lanes):
    compiled = finished_at(shapes, lanes, compiled=True)
    assert compiled == finished_at(shapes, lanes, compiled=False)
    assert len(compiled[0]) == len(shapes)


def test_a_step_alone_takes_the_sum_of_its_stages():
    (done,) = finished_at([(10, 6, 3, 5, 0)], 2, compiled=True)[0]
    ffns = sum(6 + layer % 2 for layer in range(5))
    assert done == (0, 5 * 10 + 2 + ffns + 2 * 5 * 3 + 5)


@pytest.mark.parametrize(("memories", "lost_by_each"), [((0, 0), 0.5), ((1, 1), 0.5), ((0, 1), 0.0)])
def test_devices_that_share_memory_slow_each_other_while_both_run(memories, lost_by_each):
    """Two cores of one host: the stage that begins while another runs bears what both lose, and nothing when alone."""
    clock = VirtualClock()
    pipeline, done = Pipeline(clock), []

    def device(shapes, memory):
        left = list(shapes)

        def begin():
            return Step(0, left.pop(), 0, 0, 1, attention_beside=Neighbourly(beside=2.0, draws=1.0)) if left else None

        return pipeline.add_attention(begin, lambda _: done.append(clock.now_ns()), 1, memory)

    first, second = (device([100], memory) for memory in memories)
    pipeline.submit(first)
    clock.sleep(60e-9)
    pipeline.submit(second)
    clock.sleep(1e-6)
    overlap_ns = 40
    assert done == [100, 60 + 100 + 2 * overlap_ns * lost_by_each]
