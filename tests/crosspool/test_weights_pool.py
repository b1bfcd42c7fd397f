"""FFNs spread over several weights devices: every byte lies once, tokens do not change, what crosses is counted, and what
does not fit or cannot be cut is said."""

import random
from pathlib import Path

import judges
import pytest
from hypothesis import given
from hypothesis import strategies as st
from served import served
from test_token_equality import OPTIONS, assert_equal_to_judge, ragged_requests

from crosspool.weights_pool import FFN_SHARDINGS, from_plain, legs_of, share_out, to_plain
from serving import registry
from serving.capacity import ffn_bytes
from serving.cost.table1 import published_spec
from serving.errors import CapacityError, UserError
from serving.generate import cpu_cluster, generate
from serving.interface import Demand, Device, ServedModel
from serving.parallel.share import Slice
from serving.sim.backend import simulate_card
from serving.spec import ARCHITECTURES

pytestmark = pytest.mark.cpu

PUBLISHED = ("qwen3-30b-a3b", "deepseek-v2-lite", "glm-4.7-flash")


def published():
    return [ServedModel(published_spec(name), Path("unused"), "bfloat16") for name in PUBLISHED]


@given(st.sampled_from(FFN_SHARDINGS), st.sampled_from([1, 2, 4]), st.integers(1, 3))
def test_every_layer_lies_once_and_the_whole_width_of_it(sharding, count, models):
    served_models = published()[:models]
    pool = share_out(served_models, [Device(f"d{i}", "cuda", i, 40 << 30) for i in range(count)], sharding)
    assert from_plain(to_plain(pool)) == pool
    for model in served_models:
        for layer, legs in enumerate(legs_of(model, pool)):
            parts = [pool[device][model.name].width for device, _ in legs]
            assert parts == [Slice(i, len(parts)) for i in range(len(parts))], layer
        held = sum(ffn_bytes(model, part) for one in pool for name, part in one.items() if name == model.name)
        routers = len(pool) - 1 if sharding == "tensor" else 0
        assert ffn_bytes(model) <= held <= ffn_bytes(model) * (1 + 0.01 * routers)


def test_layers_spread_the_papers_models_evenly():
    """144.4 GB of FFN weights, 36.1 GB on each of four devices (paper, derived check figures)."""
    pool = share_out(published(), [Device(f"d{i}", "cuda", i, 40 << 30) for i in range(4)], "layer")
    models = {model.name: model for model in published()}
    held = [sum(ffn_bytes(models[name], part) for name, part in one.items()) for one in pool]
    assert all(bytes_held == pytest.approx(36.1e9, rel=0.02) for bytes_held in held)


@pytest.mark.parametrize(("sharding", "control"), [("layer", "lowered"), ("tensor", "lowered"), ("tensor", "host")])
def test_tokens_equal_the_judge_over_three_devices(sharding, control, tiny_checkpoints):
    models = served(tiny_checkpoints, ARCHITECTURES)
    system = registry.create("crosspool", {**OPTIONS, "ffn_sharding": sharding, "control": control})
    rng = random.Random(sharding)
    chosen = models if control == "lowered" else models[:2]
    requests = [r for i, model in enumerate(chosen) for r in ragged_requests(model, 2, rng, first_id=100 * i)]
    rng.shuffle(requests)
    try:
        system.start(system.plan(cpu_cluster(3, 64 << 20), chosen, Demand()))
        assert_equal_to_judge(requests, generate(system, requests), tiny_checkpoints)
        crossed = sum(stats.bytes_crossed for stats in system.stats())
    finally:
        system.stop()
    specs = {model.name: model.spec for model in chosen}
    rows = {r.request_id: len(r.prompt) + r.max_new_tokens - 1 for r in requests}
    once = sum(rows[r.request_id] * specs[r.model].num_layers * specs[r.model].hidden_size * 4 * 2 for r in requests)
    assert crossed == once * (2 if sharding == "tensor" else 1)
    assert not judges.worker_processes()


def test_an_uneven_width_and_an_unknown_way_are_refused(tiny_checkpoints):
    models = served(tiny_checkpoints, ["mixtral"])
    with pytest.raises(UserError, match=r"width \d+ cannot be cut into 7"):
        registry.create("crosspool", {**OPTIONS, "ffn_sharding": "tensor"}).plan(
            cpu_cluster(8, 64 << 20), models, Demand()
        )
    with pytest.raises(UserError, match="known: whole, layer, tensor"):
        registry.create("crosspool", {"ffn_sharding": "rows"})


@pytest.mark.parametrize("sharding", FFN_SHARDINGS)
def test_what_does_not_fit_names_the_device_and_the_missing_bytes(sharding, tiny_checkpoints):
    models = served(tiny_checkpoints, ["mixtral", "qwen3_moe"])
    system = registry.create("crosspool", {**OPTIONS, "ffn_sharding": sharding})
    devices = cpu_cluster(3, 64 << 20).devices
    small = Device("cpu:2", "cpu", 2, 50_000)
    cluster = type(cpu_cluster(1, 1))((devices[0], Device("cpu:1", "cpu", 1, 60_000), small))
    with pytest.raises(CapacityError, match=r"cpu:[12]: FFN weights .* \d+ bytes .* are missing"):
        system.plan(cluster, models, Demand())


@pytest.mark.parametrize("sharding", ["layer", "tensor"])
def test_simulated_runs_take_the_same_roles(sharding, tiny_checkpoints):
    models = served(tiny_checkpoints, ["mixtral", "deepseek_v2"])
    system = registry.create("crosspool", {**OPTIONS, "ffn_sharding": sharding})
    backend = simulate_card("h200")
    requests = [r for i, m in enumerate(models) for r in ragged_requests(m, 4, random.Random(3), first_id=100 * i)]
    done = 0
    system.start(system.plan(cpu_cluster(3, 64 << 20), models, Demand()), backend)
    try:
        for request in requests:
            system.submit(request)
        for _ in range(2000):
            done += sum(event.kind.terminal for event in system.poll())
            backend.clock.sleep(0.001)
        crossed = sum(stats.bytes_crossed for stats in system.stats())
    finally:
        system.stop()
    specs = {model.name: model.spec for model in models}
    once = sum(
        (len(r.prompt) + r.max_new_tokens - 1) * specs[r.model].num_layers * specs[r.model].hidden_size * 4 * 2
        for r in requests
    )
    assert done == len(requests)
    assert crossed == once * (2 if sharding == "tensor" else 1)
