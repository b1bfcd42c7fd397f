"""Multiplexing: pages go to whoever comes first, quotas to those that wait, and a cap lets nobody be preempted."""

import pytest

from runner.observation import COMPLETED
from runner.replay import Replay
from serving import registry
from serving.errors import CapacityError, UserError
from serving.generate import cpu_cluster
from serving.interface import Demand, ServedModel
from serving.sim.backend import simulate_card
from serving.spec import load_spec
from workloads.trace import TraceRequest

pytestmark = pytest.mark.cpu

PAGE_BYTES = 4096


def served(checkpoints):
    names = ("mixtral", "deepseek_v2")
    return [
        ServedModel(load_spec(checkpoints[name], f"m{i}"), checkpoints[name], "float32") for i, name in enumerate(names)
    ]


def simulated(system_name, checkpoints, pages, **options):
    """Twelve requests of two models over a pool of `pages` pages."""
    system = registry.create(system_name, {"page_bytes": PAGE_BYTES, **options})
    models = served(checkpoints)
    needed = system.plan(cpu_cluster(1, 64 << 20), models, Demand()).devices[0]
    memory_bytes = (64 << 20) - needed.kv_bytes + pages * PAGE_BYTES
    backend = simulate_card("h200")
    system.start(system.plan(cpu_cluster(1, memory_bytes), models, Demand()), backend)
    trace = [TraceRequest(i, f"m{i % 2}", i * 1e-5, 9, 60, (1,) * 9) for i in range(12)]
    try:
        found = Replay(system, trace, 60.0, 0.0005, backend.clock).run(len(trace), "sim")
        return found.requests, system.stats()
    finally:
        system.stop()


@pytest.mark.parametrize("system_name", ["elastic", "elastic-placement", "quota"])
def test_who_finds_no_page_preempts_its_youngest_and_all_end(system_name, tiny_checkpoints):
    rows, _ = simulated(system_name, tiny_checkpoints, 24, admission="optimistic")
    assert [row.outcome for row in rows] == [COMPLETED] * len(rows)
    assert [row.output_tokens for row in rows] == [60] * len(rows)
    assert sum(row.preemptions for row in rows) > 0
    oldest = [
        min((row for row in rows if row.model == model), key=lambda row: row.request_id) for model in ("m0", "m1")
    ]
    assert min(row.preemptions for row in oldest) == 0


@pytest.mark.parametrize("system_name", ["elastic", "elastic-placement"])
def test_under_the_cap_no_elastic_engine_preempts(system_name, tiny_checkpoints):
    rows, stats = simulated(system_name, tiny_checkpoints, 24, admission="cap")
    assert [row.outcome for row in rows] == [COMPLETED] * len(rows)
    assert sum(row.preemptions for row in rows) == 0
    assert sum(device.preemptions for device in stats) == 0


def test_quotas_start_in_proportion_to_rate_layers_and_kv_width(tiny_checkpoints):
    models = served(tiny_checkpoints)
    system = registry.create("quota", {"page_bytes": PAGE_BYTES})
    shares = system.plan(cpu_cluster(1, 64 << 20), models, Demand({"m0": 1.0, "m1": 3.0})).options["shares"]["cpu:0"]
    wide = [m.spec.num_layers * m.spec.kv_bytes_per_token_layer("float32") for m in models]
    assert shares["m1"] / shares["m0"] == pytest.approx(3 * wide[1] / wide[0])
    assert sum(shares.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quotas": {"m0": 0.7, "m1": 0.6}}, "sum to at most 1, these to 1.3"),
        ({"quotas": {"m0": 0.5, "other": 0.5}}, "names other; served: m0, m1"),
        ({"quotas": {"m0": 0.5}}, "has none for m1"),
        ({"adapt_every_s": -1}, "must be 0 or more"),
        ({"crowded": 0}, "above 0 and at most 1"),
        ({"admission": "all"}, "known: optimistic, cap"),
    ],
)
def test_bad_quotas_are_one_line(options, message, tiny_checkpoints):
    with pytest.raises(UserError, match=message):
        registry.create("quota", options).plan(cpu_cluster(1, 64 << 20), served(tiny_checkpoints), Demand())


@pytest.mark.parametrize("system_name", ["elastic", "quota"])
def test_models_larger_than_a_device_name_the_missing_bytes(system_name, tiny_checkpoints):
    with pytest.raises(CapacityError, match=r"cpu:0: .* bytes .* are missing"):
        registry.create(system_name).plan(cpu_cluster(1, 1 << 16), served(tiny_checkpoints), Demand())


@pytest.mark.parametrize("pages", [24, 400])
def test_idle_weights_leave_and_come_back_and_their_bytes_are_kv_meanwhile(pages, tiny_checkpoints):
    """One model is asked for once, goes, and is asked for again while the other has all that it left."""
    trace = [TraceRequest(0, "m1", 0.0, 9, 5, (1,) * 9)]
    trace += [TraceRequest(1 + i, "m0", 1.0 + i * 1e-5, 9, 50 + i % 11, (1,) * 9) for i in range(200)]
    trace += [TraceRequest(201, "m1", 1.1, 9, 5, (1,) * 9)]
    system = registry.create(
        "elastic-placement", {"page_bytes": PAGE_BYTES, "idle_evict_s": 0.5, "prompts_at_once": 99}
    )
    models = served(tiny_checkpoints)
    needed = system.plan(cpu_cluster(1, 64 << 20), models, Demand()).devices[0]
    memory_bytes = (64 << 20) - needed.kv_bytes + pages * PAGE_BYTES
    backend = simulate_card("h200")
    system.start(system.plan(cpu_cluster(1, memory_bytes), models, Demand()), backend)
    try:
        found = Replay(system, trace, 60.0, 0.0005, backend.clock).run(len(trace), "sim")
        (device,) = system.stats()
    finally:
        system.stop()
    assert [row.outcome for row in found.requests] == [COMPLETED] * len(trace)
    assert device.swaps == 2, "both were idle before their second burst"
    assert device.switch_ns["weights"] > 0
    most = max(row.pages_in_use for row in found.pools if row.model == "m0")
    assert (most > pages) == (pages == 24), "where KV is scarce it grows into what the idle weights left"
