"""Lanes on cards whose contention was measured: each goes on by itself, slowed by those that are on its card at the time."""

import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.replay import Replay
from serving import registry
from serving.cost.hardware import DECODE, PROMPT
from serving.cost.table1 import published_spec
from serving.interface import Cluster, Demand, Device, ServedModel
from serving.sim import card_events
from serving.sim.backend import simulate_card
from serving.sim.card_lanes import CardLanes, CardStep, Stages
from serving.sim.clock import VirtualClock
from workloads.trace import TraceRequest

pytestmark = pytest.mark.cpu

WAITS = {DECODE: {DECODE: 0.5, PROMPT: 0.75}, PROMPT: {DECODE: 0.25, PROMPT: 1.0}}
MODELS = [
    ServedModel(published_spec(name), Path("unused"), "bfloat16")
    for name in ("qwen3-30b-a3b", "deepseek-v2-lite", "glm-4.7-flash")
]
GIB = 1 << 30


def step(*stages, kind=0, payload=None):
    """`stages` of (place, nanoseconds alone, kernels), drawing nothing of a card's bandwidth."""
    places = np.array([place for place, _, _ in stages], np.int64)
    numbers = np.array([[alone_ns, alone_ns / kernels, 0.0, 0.0] for _, alone_ns, kernels in stages], float)
    return CardStep(payload, kind, Stages(places, numbers), crossed_bytes=7)


def ends_of(steps, cards, lanes=None, waits=WAITS, compiled=False, looks=()):
    """When each of `steps` ends that all begin at 0 (in as many lanes, or one after the other), on devices of the `cards` of these
    numbers, each a place of its own, and the next place is the first and the last at once; the clock is also stopped at every time in
    `looks`."""
    clock, waiting, ended = VirtualClock(), list(enumerate(steps)), {}
    system = CardLanes(clock, waits, compiled)

    def begin():
        if not waiting:
            return None
        number, one = waiting.pop(0)
        return one._replace(payload=number)

    attention = system.add_attention(
        begin, lambda number: ended.setdefault(number, clock.now_ns()), lanes or len(steps), cards[0]
    )
    for card in cards[1:]:
        system.add_ffn(card)
    assert [system.place(device) for device in range(len(cards))] == list(range(len(cards)))
    system.place(0, len(cards) - 1)
    attention.submit()
    for at_ns in looks:
        clock.sleep(max(at_ns - clock.now_ns(), 0) / 1e9)
    clock.sleep(10.0)
    return [ended[number] for number in range(len(steps))], attention


def test_a_lone_lane_takes_the_sum_of_its_stages():
    (end,), attention = ends_of([step((0, 1000, 4), (card_events.ON_THE_WAY, 30, 1), (1, 500, 2), (0, 70, 1))], (0, 1))
    assert end == 1600
    assert attention.busy_ns == 1070 and attention.crossed_bytes == 7


def test_stages_on_different_cards_do_not_mind_each_other():
    ends, _ = ends_of([step((0, 1000, 1)), step((1, 400, 1))], (0, 1))
    assert ends == [1000, 400]


def test_a_kernel_waits_for_a_part_of_one_of_each_stage_on_its_card():
    """Ten kernels of 100 ns beside five of 400: 1 + 0.5 * 4 times as long, 1 + 0.5 / 4 times; devices 0 and 1 are on one card."""
    ends, _ = ends_of([step((0, 1000, 10)), step((1, 2000, 5))], (0, 0))
    assert ends[1] == 2250
    assert ends[0] == 2250 + (1000 - 2250 / 3)


def test_a_stage_on_several_cards_goes_on_as_on_the_one_where_it_fares_worst():
    both, first, last = step((2, 1000, 1)), step((0, 100, 1)), step((1, 2000, 1))
    assert ends_of([both, last], (0, 1))[0] == [2000, 2000 + (2000 - 2000 / 1.25)]
    assert ends_of([both, first, last], (0, 1))[0] == [
        2000,
        600,
        2400,
    ]  # as beside the last alone: it is slowed by more there


def test_kinds_wait_differently():
    ends, _ = ends_of([step((0, 1000, 1), kind=0), step((0, 1000, 1), kind=1)], (0,))
    assert ends[1] == 1250  # a prompt beside decode
    assert ends[0] == pytest.approx(1250 + 1000 - 1250 / 1.75, abs=1)


def test_bandwidth_counts_where_it_says_more():
    streaming = step((0, 1000, 1))
    streaming.stages.numbers[:, card_events.BYTES] = 0.9
    assert ends_of([streaming, streaming], (0,))[0] == [1720, 1720]  # 1 + 0.9 * 0.8 rather than 1.5


def test_a_step_that_waits_for_a_lane_begins_when_one_is_free():
    assert ends_of([step((0, 1000, 1)), step((0, 300, 1))], (0,), lanes=1)[0] == [1000, 1300]


some_steps = st.lists(
    st.builds(
        lambda stages, kind: step(*stages, kind=kind),
        st.lists(st.tuples(st.integers(-1, 3), st.integers(1, 5000), st.integers(1, 20)), min_size=1, max_size=12),
        st.integers(0, 1),
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=60, deadline=None)
@given(some_steps, st.integers(1, 4), st.lists(st.integers(0, 40_000), max_size=6))
def test_whoever_looks_and_however_often_it_is_the_same(steps, lanes, looks):
    """Machine code or not, stopped in between or not; and nobody is faster than alone."""
    cards = (0, 0, 1)
    ends, attention = ends_of(steps, cards, lanes)
    assert ends_of(steps, cards, lanes, compiled=True)[0] == ends
    assert ends_of(steps, cards, lanes, looks=sorted(looks))[0] == ends
    alone = [one.stages.numbers[:, card_events.ALONE_NS].sum() for one in steps]
    assert all(end >= own for end, own in zip(ends, alone, strict=True))
    free = {own: {other: 0.0 for other in WAITS} for own in WAITS}
    if lanes >= len(steps):
        assert ends_of(steps, cards, lanes, waits=free)[0] == pytest.approx(alone, abs=len(steps) * 13)
    assert attention.crossed_bytes == 7 * len(steps)


def simulate(requests, budgets_gib, compiled=True, **options):
    backend = simulate_card("h200-measured", compiled)
    options = {"page_bytes": 2 << 20, "ffn_sharding": "layer", "max_batch": 4, **options}
    system = registry.create("crosspool", options)
    devices = tuple(Device(f"gpu:{i}", "cuda", i, gib * GIB, card="h200-measured") for i, gib in enumerate(budgets_gib))
    system.start(system.plan(Cluster(devices), MODELS, Demand()), backend)
    try:
        seen = Replay(system, requests, 60.0, 0.002, backend.clock, lengths_only=True).run(len(requests), "sim")
    finally:
        system.stop()
    return [row.token_times_ns for row in seen.requests], seen.devices


def trace(rate_rps, seconds=3, seed=0):
    rng, now_s, requests = random.Random(seed), 0.0, []
    while (now_s := now_s + rng.expovariate(rate_rps)) < seconds:
        requests.append(
            TraceRequest(len(requests), rng.choice(MODELS).name, now_s, rng.randint(1, 700), rng.randint(2, 40), ())
        )
    return requests


@pytest.mark.parametrize("lanes", [1, 3])
def test_compiled_or_not_a_load_is_the_same(lanes):
    requests = trace(6.0)
    compiled = simulate(requests, (100, 100), kv_share=0.4, lanes=lanes)
    assert compiled == simulate(requests, (100, 100), compiled=False, kv_share=0.4, lanes=lanes)
    assert all(len(times) == request.output_tokens for times, request in zip(compiled[0], requests, strict=True))


def test_three_models_at_once_slow_each_other_and_none_waits_for_another():
    """A token each takes longer beside the others than alone, by less than if steps were taken one after the other."""

    def mean_ms(models):
        requests = [TraceRequest(n, model.name, 0.0, 1, 60, ()) for n, model in enumerate(models)]
        times = simulate(requests, (100, 100), kv_share=0.4, lanes=3)[0]
        return [np.diff(own[10:40]).mean() / 1e6 for own in times]

    alone, together = [mean_ms([model])[0] for model in MODELS], mean_ms(MODELS)
    assert all(1.1 * own < beside < sum(alone) for own, beside in zip(alone, together, strict=True))
