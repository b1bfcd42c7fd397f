"""Engines that nobody arbitrates: alone they take their own time, together they stretch each other as the contention model
says, KV goes to whoever comes first, and what is preempted is computed again."""

from pathlib import Path

import pytest

from runner.replay import Replay
from serving import registry
from serving.cost.contention import Contention, Load, slowdowns
from serving.cost.hardware import load_hardware
from serving.cost.table1 import published_spec
from serving.errors import UserError
from serving.interface import Cluster, Demand, Device, ServedModel
from serving.sim.backend import simulate_card
from serving.sim.clock import VirtualClock
from serving.sim.shared import Crowd, SharedDevice
from workloads.trace import TraceRequest

pytestmark = pytest.mark.cpu

A100 = load_hardware("a100-40gb")
BOUND = Load(0.010, 0.010 * A100.memory_bandwidth, 0.0)  # nothing but memory traffic


def crowd(*names, **contention):
    clock = VirtualClock()
    made = Crowd(clock, Contention(**contention), "bfloat16")
    made.devices.update({name: SharedDevice(A100, 10) for name in names})
    return clock, made


def test_steps_stretch_each_other_only_while_both_run():
    clock, both = crowd("a", interference=0.2)
    ended = []
    both.start(BOUND, ["a"], lambda: ended.append(clock.now_ns() / 1e9))
    clock.sleep(0.004)
    both.start(BOUND, ["a"], lambda: ended.append(clock.now_ns() / 1e9))
    clock.sleep(1)
    stretch = slowdowns([BOUND, BOUND], A100, Contention(interference=0.2))[0]
    assert stretch == pytest.approx(2.4)
    first_s = 0.004 + 0.006 * stretch
    assert ended == pytest.approx([first_s, first_s + 0.004], rel=1e-6)
    assert both.devices["a"].busy_s == pytest.approx(ended[1])


def test_a_group_is_as_slow_as_on_its_worst_device():
    clock, both = crowd("a", "b")
    ended, long = {}, Load(0.1, 0.1 * A100.memory_bandwidth, 0.0, kernels=50)
    both.start(BOUND, ["a", "b"], lambda: ended.setdefault("wide", clock.now_ns() / 1e9))
    both.start(long, ["b"], lambda: ended.setdefault("b", clock.now_ns() / 1e9))
    clock.sleep(1)
    assert ended["wide"] == pytest.approx(0.010 * slowdowns([BOUND, long], A100, Contention())[0], rel=1e-6)


def test_steps_on_other_cores_slow_each_other_by_what_each_draws_and_those_on_one_core_draw_in_turn():
    clock, cores = crowd("a", "b", "elsewhere", interference=0.2)
    cores.devices["elsewhere"].memory = 1
    bandwidth, ended = A100.memory_bandwidth, {}

    def start(name, device, draws, beside):
        load = Load(0.010, 0.010 * draws * bandwidth, 0.0, beside)
        cores.start(load, [device], lambda: ended.setdefault(name, clock.now_ns() / 1e9))

    start("mine", "a", 0.2, 1.5)
    start("other", "elsewhere", 1.0, 1.5)
    for name, draws in (("one", 0.5), ("two", 0.1)):
        start(name, "b", draws, 1.3)
    clock.sleep(1)
    shared = slowdowns(
        [Load(0.010, 0.010 * draws * bandwidth, 0.0) for draws in (0.5, 0.1)], A100, Contention(interference=0.2)
    )
    assert ended["other"] == pytest.approx(0.010, rel=1e-6)
    assert ended["mine"] == pytest.approx(0.010 * (1 + 0.5 * 0.3), rel=1e-6)  # 0.5 and 0.1 in turn are 0.3
    slow = ended["mine"] / (shared[0] * (1 + 0.3 * 0.2))  # of "one", while "mine" ran; neither is over before
    assert ended["one"] == pytest.approx(ended["mine"] + (0.010 - slow) * shared[0], rel=1e-6)


def test_a_card_knows_nothing_of_neighbours_and_of_steps_that_differ(monkeypatch):
    def unknown(*_):
        raise AssertionError("asked for on a card")

    seen = serve(requests(8, 200, 50), 140 << 30)[1]
    monkeypatch.setattr("serving.sim.shared.neighbour_slowdown", unknown)
    monkeypatch.setattr("random.Random.choice", unknown)
    assert serve(requests(8, 200, 50), 140 << 30)[1].requests == seen.requests


MODELS = [
    ServedModel(published_spec(name), Path("unused"), "bfloat16") for name in ("deepseek-v2-lite", "glm-4.7-flash")
]
GROUPS = {
    MODELS[0].name: {"devices": [0, 1]},
    MODELS[1].name: {"devices": [0, 1]},
}


def serve(requests, memory_bytes, **options):
    cluster = Cluster(tuple(Device(f"gpu:{i}", "cuda", i, memory_bytes, card="h200") for i in range(2)))
    system, backend = registry.create("elastic", {"groups": GROUPS, "page_bytes": 2 << 20, **options}), None
    placement = system.plan(cluster, MODELS, Demand())
    backend = simulate_card("h200")
    system.start(placement, backend)
    try:
        return placement, Replay(system, requests, 600.0, 0.002, backend.clock, lengths_only=True).run(0, "sim")
    finally:
        system.stop()


def requests(count, prompt, output):
    return [TraceRequest(i, MODELS[i % 2].name, 0.01 * i, prompt, output, ()) for i in range(count)]


def test_scarce_kv_preempts_and_every_request_still_completes():
    ample, seen = serve(requests(12, 1600, 400), 140 << 30)
    assert {row.outcome for row in seen.requests} == {"completed"} and not sum(r.preemptions for r in seen.requests)
    least = sum(ample.devices[0].weights_bytes.values()) + (700 << 20)
    scarce, tight = serve(requests(12, 1600, 400), least)
    assert scarce.devices[0].kv_bytes < 800 << 20
    assert {row.outcome for row in tight.requests} == {"completed"}
    assert sum(row.preemptions for row in tight.requests) > 0
    assert max(row.pages_in_use for row in tight.pools) <= scarce.devices[0].kv_bytes // (2 << 20)
    assert tight.duration_ns > seen.duration_ns
    again = serve(requests(12, 1600, 400), least)[1]
    assert [row.token_times_ns for row in again.requests] == [row.token_times_ns for row in tight.requests]


def test_contention_costs_and_unknown_kinds_are_refused():
    shared = serve(requests(8, 200, 50), 140 << 30)[1].duration_ns
    sliced = serve(requests(8, 200, 50), 140 << 30, contention="time_slice")[1].duration_ns
    assert sliced > shared
    with pytest.raises(UserError, match="unknown contention mode 'mps'; known: share, time_slice"):
        registry.create("elastic", {"contention": "mps"})


def test_the_real_backend_says_that_cpu_engines_cannot():
    system = registry.create("elastic", {"groups": GROUPS})
    cluster = Cluster(tuple(Device(f"cpu:{i}", "cpu", i, 140 << 30) for i in range(2)))
    with pytest.raises(UserError, match="backend=sim"):
        system.start(system.plan(cluster, MODELS, Demand()))
