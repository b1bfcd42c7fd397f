"""The simulated backend: virtual time adds up to the stages' costs, runs repeat bit for bit, and policies are the real ones."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.observation import COMPLETED
from runner.replay import Replay
from serving import registry
from serving.generate import cpu_cluster
from serving.interface import Demand, Request, ServedModel
from serving.sim.backend import SimulatedBackend, simulate_card
from serving.sim.clock import VirtualClock
from serving.spec import load_spec
from workloads.trace import TraceRequest

pytestmark = pytest.mark.cpu


def requests(count, gap_s=0.001, prompt=9, output=6):
    return [TraceRequest(i, f"m{i % 2}", i * gap_s, prompt + i, output, (1,) * (prompt + i)) for i in range(count)]


def simulate(system_name, checkpoints, trace, **options):
    names = ("mixtral", "glm4_moe_lite")
    models = [
        ServedModel(load_spec(checkpoints[name], f"m{i}"), checkpoints[name], "bfloat16")
        for i, name in enumerate(names)
    ]
    backend = simulate_card("h200")
    system = registry.create(system_name, {"page_bytes": 4096, **options})
    system.start(system.plan(cpu_cluster(2, 64 << 20), models, Demand()), backend)
    try:
        return Replay(system, trace, 10.0, 0.0005, backend.clock).run(len(trace), "sim")
    finally:
        system.stop()


@given(st.lists(st.floats(0, 5), max_size=30))
def test_the_clock_runs_events_in_order_of_time_then_of_scheduling(delays):
    clock, seen = VirtualClock(), []
    for number, delay in enumerate(delays):
        clock.after(delay, lambda n=number: seen.append((clock.now_ns(), n)))
    clock.sleep(6)
    assert seen == sorted((round(delay * 1e9), number) for number, delay in enumerate(delays))
    assert clock.now_ns() == 6 * 10**9


def test_the_past_cannot_be_scheduled():
    with pytest.raises(ValueError, match="ago"):
        VirtualClock().after(-1, lambda: None)


@pytest.mark.parametrize("options", [{}, {"control": "host"}, {"lanes": 1}, {"lanes": 3}], ids=str)
def test_every_request_completes_and_runs_repeat_bit_for_bit(options, tiny_checkpoints):
    first = simulate("crosspool", tiny_checkpoints, requests(12), **options)
    second = simulate("crosspool", tiny_checkpoints, requests(12), **options)
    assert {row.outcome for row in first.requests} == {COMPLETED}
    assert [row.token_times_ns for row in first.requests] == [row.token_times_ns for row in second.requests]
    assert first.pools == second.pools and first.pools[-1].pages_in_use == 0


def test_host_driven_control_costs_time_and_a_second_lane_saves_some(tiny_checkpoints):
    def duration(**options):
        return simulate("crosspool", tiny_checkpoints, requests(8, gap_s=0.0), **options).duration_ns

    assert duration(lanes=2) < duration(lanes=1) < duration(lanes=1, control="host")


def test_one_request_alone_takes_the_sum_of_its_stages(tiny_checkpoints):
    """Static, one model, one request: prefill and decode stages follow one another with nothing between."""
    trace = [TraceRequest(0, "m", 0.0, 5, 4, (1,) * 5)]
    spec = load_spec(tiny_checkpoints["mixtral"], "m")
    model = ServedModel(spec, tiny_checkpoints["mixtral"], "bfloat16")
    backend = simulate_card("h200")
    assert isinstance(backend, SimulatedBackend)
    system = registry.create("static", {"page_bytes": 4096})
    system.start(system.plan(cpu_cluster(1, 64 << 20), [model], Demand()), backend)
    (row,) = Replay(system, trace, 10.0, 0.0005, backend.clock).run(1, "sim").requests
    system.stop()
    stages = backend._stages_for(model, cpu_cluster(1, 1).devices[0])
    layers = range(spec.num_layers)

    def step_s(attention, rows):
        parts = [
            stages.embedding(rows),
            *[attention] * spec.num_layers,
            *[stages.ffn(i, rows) for i in layers],
            stages.head(1),
        ]
        return sum(stages.launched_s(part) for part in parts)

    gaps_s = [(b - a) / 1e9 for a, b in zip(row.token_times_ns, row.token_times_ns[1:], strict=False)]
    expected_s = [step_s(stages.mixed_attention(1, 5 + n, []), 1) for n in (1, 2, 3)]
    # launches are added a stage at a time here and a layer at a time there
    assert gaps_s == pytest.approx(expected_s, rel=0.25)
    assert row.token_times_ns[0] / 1e9 == pytest.approx(step_s(stages.mixed_attention(0, 0, [(5, 0)]), 5), rel=0.25)


def test_transfers_as_stages_of_their_own_never_slow_a_pipeline_and_help_a_deep_one(tiny_checkpoints):
    """With two stages a device is held up by what leaves it; more batches in flight cannot hide that, four stages can."""
    spec = load_spec(tiny_checkpoints["mixtral"], "mixtral")
    took_ns = {}
    for lanes in (1, 4):
        for stages in (2, 4):
            system = registry.create(
                "crosspool", {"lanes": lanes, "stages": stages, "max_batch": 1, "page_bytes": 4096}
            )
            backend = simulate_card("a100-40gb")
            models = [ServedModel(spec, tiny_checkpoints["mixtral"])]
            try:
                system.start(system.plan(cpu_cluster(2, 64 << 20), models, Demand()), backend)
                for number in range(4):
                    system.submit(Request(number, "mixtral", (1, 2, 3), 40))
                backend.clock.sleep(10.0)
                ended = [event.time_ns for event in system.poll() if event.kind.terminal]
            finally:
                system.stop()
            assert len(ended) == 4
            took_ns[lanes, stages] = max(ended)
    assert took_ns[4, 4] < took_ns[4, 2]
    assert took_ns[1, 4] == pytest.approx(took_ns[1, 2], rel=0.01)  # alone, a batch waits for its rows either way


def test_chunks_of_a_lone_prompt_overlap_in_the_pipeline(tiny_checkpoints):
    trace = [TraceRequest(0, "m0", 0.0, 96, 2, (1,) * 96)]
    first_token_ns = [
        simulate("crosspool", tiny_checkpoints, trace, prefill_chunk=16, chunks_in_flight=chunks)
        .requests[0]
        .token_times_ns[0]
        for chunks in (1, 2)
    ]
    assert first_token_ns[1] < 0.8 * first_token_ns[0]
