"""The swap baseline as a system: tokens through swaps and moves of KV, times by part, and what cannot be run."""

import random
import time

import pytest
from served import served, with_kv_pages
from test_token_equality import assert_equal_to_judge, descriptors_left, open_descriptors, ragged_requests

from serving import registry
from serving.cost.hardware import load_hardware
from serving.errors import CapacityError, UserError
from serving.generate import cpu_cluster, generate
from serving.interface import Demand, EventKind
from serving.residency.image import image_bytes
from serving.sim.backend import simulate_card
from serving.sim.swapping import unit_bytes
from serving.spec import ARCHITECTURES

pytestmark = pytest.mark.cpu

OPTIONS = {"max_batch": 8, "prefill_chunk": 16, "page_bytes": 4096}
QUICK_TURNS = {"mode": "token", "tbt_target_s": 0.002, "max_quota_s": 0.004}
SYSTEMS = {
    "request": {"hysteresis_s": 0.002},
    "request-throttled-other-core": {"hysteresis_s": 0.002, "link_gbps": 0.5, "loader_core": "other"},
    "token": QUICK_TURNS,
}


def room_for_one(models, kv_bytes=2 << 20):
    """A cluster of one device whose arena holds the largest model and little else."""
    return cpu_cluster(1, max(map(image_bytes, models)) + kv_bytes)


def many(models, rng, each=5):
    requests = [r for n, model in enumerate(models) for r in ragged_requests(model, each, rng, first_id=100 * n)]
    rng.shuffle(requests)
    return requests


@pytest.mark.parametrize("mode", SYSTEMS)
def test_tokens_equal_the_judge_through_swaps_on_every_architecture(mode, tiny_checkpoints):
    descriptors = open_descriptors()
    models = served(tiny_checkpoints, ARCHITECTURES)
    system = registry.create("swap", {**OPTIONS, "weights_share": 0.01, **SYSTEMS[mode]})
    requests = many(models, random.Random(mode))
    try:
        system.start(system.plan(room_for_one(models), models, Demand()))
        assert_equal_to_judge(requests, generate(system, requests), tiny_checkpoints)
        (stats,) = system.stats()
        assert stats.swaps >= len(models) - 1  # not all of them fit beside each other
        assert stats.switch_ns["weights"] > 0 and stats.switch_ns["warm_up"] > 0
        assert sum(system.pool_samples()[-1].pages_in_use.values()) == 0
    finally:
        system.stop()
    assert descriptors_left(descriptors) == []


def test_kv_of_models_out_of_turn_goes_to_host_memory_and_back(tiny_checkpoints):
    models = served(tiny_checkpoints, ARCHITECTURES)
    system = registry.create("swap", {**OPTIONS, **QUICK_TURNS})
    requests = many(models, random.Random(5), each=4)
    try:
        placement = system.plan(room_for_one(models, 8 << 20), models, Demand())
        placement = with_kv_pages(placement, 40, OPTIONS["page_bytes"])
        system.start(placement)
        assert_equal_to_judge(requests, generate(system, requests), tiny_checkpoints)
        assert sum(system.notes()["swap"]["kv_moved_bytes"].values()) > 0
        assert system.stats()[0].switch_ns["kv"] > 0
    finally:
        system.stop()


def test_a_host_cache_of_one_model_reads_checkpoints_again(tiny_checkpoints):
    models = served(tiny_checkpoints, ["mixtral", "qwen3_moe"])
    cache_bytes = max(map(image_bytes, models))
    system = registry.create("swap", {**OPTIONS, "hysteresis_s": 0.002, "host_cache_bytes": cache_bytes})
    requests = many(models, random.Random(6), each=3)
    try:
        system.start(system.plan(room_for_one(models, 1 << 20), models, Demand()))
        assert_equal_to_judge(requests, generate(system, requests), tiny_checkpoints)
        assert system.stats()[0].switch_ns["checkpoint"] > 0
    finally:
        system.stop()


def test_the_bound_never_swaps_and_says_what_it_is(tiny_checkpoints):
    models = served(tiny_checkpoints, ["mixtral", "deepseek_v2", "qwen3_moe"])
    system = registry.create("swap", {**OPTIONS, "zero_cost": True})
    requests = many(models, random.Random(8), each=3)
    try:
        system.start(system.plan(room_for_one(models), models, Demand()))
        assert_equal_to_judge(requests, generate(system, requests), tiny_checkpoints)
        assert system.stats()[0].swaps == 0
        assert "beyond the devices' memory" in system.notes()["swap"]["bound"]
    finally:
        system.stop()


def test_a_model_larger_than_a_device_and_a_cache_smaller_than_a_model_are_refused(tiny_checkpoints):
    models = served(tiny_checkpoints, ["mixtral", "qwen3_moe"])
    with pytest.raises(CapacityError, match=r"cpu:0: mixtral needs .* bytes are missing"):
        registry.create("swap", OPTIONS).plan(cpu_cluster(1, 1 << 20), models, Demand())
    with pytest.raises(CapacityError, match=r"host cache of .* cannot hold mixtral"):
        registry.create("swap", {**OPTIONS, "host_cache_bytes": 1 << 20}).plan(room_for_one(models), models, Demand())


@pytest.mark.alone
@pytest.mark.parametrize("backend", ["real", "sim"])
def test_who_waits_past_the_deadline_for_a_seat_is_rejected_and_nobody_else(backend, tiny_checkpoints):
    """The first model stays however long it idles, so the other one's requests wait on the device."""
    models = served(tiny_checkpoints, ["mixtral", "qwen3_moe"])
    options = {"keep_alive_s": 1000, "prefetch": False, "queue_deadline_s": 0.3, "weights_share": 0.01}
    system = registry.create("swap", {**OPTIONS, **options})
    simulated = simulate_card("h200") if backend == "sim" else None
    stays, waits = (ragged_requests(model, 2, random.Random(3), first_id=10 * n) for n, model in enumerate(models))
    try:
        demand = Demand(rate_rps={"mixtral": 2.0, "qwen3_moe": 1.0})
        system.start(system.plan(room_for_one(models), models, demand), simulated)
        started, ends = time.monotonic(), {}
        for requests in (stays, waits):
            for request in requests:
                system.submit(request)
            while not all(request.request_id in ends for request in requests):
                assert time.monotonic() - started < 30
                simulated.clock.sleep(0.01) if simulated else time.sleep(0.01)
                ends |= {event.request_id: event for event in system.poll() if event.kind.terminal}
        assert all(ends[request.request_id].kind is EventKind.COMPLETED for request in stays)
        for request in waits:
            assert ends[request.request_id].kind is EventKind.REJECTED
            assert ends[request.request_id].reason == "waited longer than 0.3 s for its device"
        assert system.stats()[0].swaps == 0
    finally:
        system.stop()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"link_gbps": 0}, "link_gbps is 0: no weights would ever come"),
        ({"mode": "layer"}, "mode is 'layer'; known: request, token"),
        ({"eviction": "mru"}, "unknown eviction rule 'mru'"),
        ({"weights_share": 1.5}, "weights_share is 1.5"),
        ({"max_quota_s": 0}, "max_quota_s is 0"),
    ],
    ids=str,
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        registry.create("swap", options)


@pytest.mark.parametrize("options", [{"hysteresis_s": 0.002}, QUICK_TURNS, {"zero_cost": True}], ids=str)
def test_simulated_runs_swap_complete_and_repeat_bit_for_bit(options, tiny_checkpoints):
    def run():
        models = served(tiny_checkpoints, ARCHITECTURES)
        backend = simulate_card("h200")
        system = registry.create("swap", {**OPTIONS, **options})
        system.start(system.plan(room_for_one(models), models, Demand()), backend)
        for request in many(models, random.Random(2), each=4):
            system.submit(request)
        events = []
        for _ in range(2000):
            backend.clock.sleep(0.01)
            events += system.poll()
        stats = system.stats()
        system.stop()
        return events, stats

    events, stats = run()
    assert sum(event.kind is EventKind.COMPLETED for event in events) == 4 * len(ARCHITECTURES)
    assert (stats[0].swaps > 0) == ("zero_cost" not in options)
    assert run() == (events, stats)


def test_a_simulated_host_cache_of_one_model_reads_checkpoints_again_and_two_devices_share_its_disk(tiny_checkpoints):
    models = served(tiny_checkpoints, ["mixtral", "qwen3_moe"])

    def run(cache_bytes, devices=1):
        backend = simulate_card("h200")
        options = {"hysteresis_s": 0.002, "host_cache_bytes": cache_bytes, "prefetch": False, "weights_share": 0.01}
        system = registry.create("swap", {**OPTIONS, **options})
        cluster = cpu_cluster(devices, room_for_one(models, 1 << 20).memory_bytes)
        system.start(system.plan(cluster, models, Demand()), backend)
        for request in many(models, random.Random(6), each=4):
            system.submit(request)
        backend.clock.sleep(60)
        ends = [event for event in system.poll() if event.kind.terminal]
        assert [event.kind for event in ends] == [EventKind.COMPLETED] * 8
        stats, misses = system.stats(), system.notes()["swap"]["host_cache_misses"]
        system.stop()
        return (
            max(event.time_ns for event in ends),
            sum(one.switch_ns["checkpoint"] for one in stats if one.swaps),
            sum(misses.values()),
        )

    largest = max(map(image_bytes, models))
    all_ns, all_read_ns, all_misses = run(0)
    assert (all_read_ns, all_misses) == (0, 0)
    one_ns, one_read_ns, one_misses = run(largest)
    least = min(map(image_bytes, models)) / load_hardware("h200").disk_bandwidth * 1e9
    assert one_misses >= 1
    assert one_read_ns >= 0.999 * one_misses * least
    assert one_ns > all_ns
    assert run(largest, devices=2) == run(largest, devices=2)


def test_a_simulated_load_takes_what_the_link_takes_and_layers_come_one_by_one(tiny_checkpoints):
    models = served(tiny_checkpoints, ["mixtral", "qwen3_moe"])
    assert all(sum(unit_bytes(model)) == image_bytes(model) for model in models)
    backend = simulate_card("h200")
    system = registry.create("swap", {**OPTIONS, "link_gbps": 0.001})
    system.start(system.plan(room_for_one(models, 1 << 20), models, Demand()), backend)
    (request,) = ragged_requests(models[1], 1, random.Random(1))
    system.submit(request)
    backend.clock.sleep(60)
    assert [event.kind for event in system.poll()][-1] is EventKind.COMPLETED
    (stats,) = system.stats()
    system.stop()
    assert stats.switch_ns["weights"] / 1e9 == pytest.approx(image_bytes(models[1]) / 1e6, rel=0.01)
