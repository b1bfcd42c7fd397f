"""What is decided about cards before one is touched: which options they take, and what is said where there is none."""

import ctypes
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from served import served

from crosspool.engine import CrossPool, CrossPoolOptions
from kernels.attention import gqa_scratch_bytes
from kernels.mla import mla_scratch_bytes
from serving import registry
from serving.backend import MonotonicClock
from serving.capacity import ffn_bytes, ffn_workspace_bytes
from serving.cost.table1 import published_spec
from serving.cuda import driver
from serving.cuda.build import card
from serving.cuda.exchange import bytes_crossed
from serving.errors import CapacityError, UserError
from serving.generate import cpu_cluster, cuda_cluster
from serving.interface import Cluster, Demand, Device, ServedModel
from serving.residency.image import placed_bytes
from serving.spec import MLASpec, load_spec

pytestmark = pytest.mark.cpu

without_card = pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a card")


PAGE_BYTES = 2 << 20
CARD = Cluster((Device("gpu0", "cuda", 0, 1 << 30),))


@pytest.fixture
def model(tiny_checkpoints):
    return ServedModel(load_spec(tiny_checkpoints["mixtral"]), tiny_checkpoints["mixtral"])


@pytest.fixture
def models(tiny_checkpoints):
    return served(tiny_checkpoints, ("mixtral", "qwen3_moe"))


def test_resident_control_is_refused_on_the_cpu(model):
    with pytest.raises(UserError, match="resident is of cuda devices"):
        CrossPool(CrossPoolOptions(control="resident")).plan(cpu_cluster(2, 64 << 20), [model], Demand())


def test_both_pools_of_one_card_have_budgets_of_their_own(model):
    devices = (Device("kv", "cuda", 0, 1 << 30), Device("weights", "cuda", 0, 2 << 30))
    kv, weights = CrossPool(CrossPoolOptions(page_bytes=2 << 20)).plan(Cluster(devices), [model], Demand()).devices
    assert kv.role == "kv-pool"
    assert 0 < kv.kv_bytes < 1 << 30
    assert sum(weights.weights_bytes.values()) < 2 << 30


def test_ffns_take_what_they_need_of_a_lone_card_and_kv_the_rest(model):
    system = CrossPool(CrossPoolOptions(page_bytes=2 << 20, kv_share=None, ffn_sharding="layer"))
    kv, weights = system.plan(CARD, [model], Demand()).devices
    assert kv.device.memory_bytes + weights.device.memory_bytes == CARD.memory_bytes
    needed = ffn_bytes(model) + system.options.lanes * ffn_workspace_bytes(model, system.options.limits)
    assert weights.device.memory_bytes == needed == sum(weights.weights_bytes.values()) + needed - ffn_bytes(model)
    with pytest.raises(CapacityError, match="FFN weights and workspace"):
        system.plan(Cluster((Device("gpu0", "cuda", 0, needed - 1),)), [model], Demand())
    with pytest.raises(UserError, match="there are 2 devices: give a share"):
        system.plan(cuda_two(), [model], Demand())


@pytest.mark.parametrize("name", ["qwen3-30b-a3b", "deepseek-v2-lite"])
@pytest.mark.parametrize(
    ("system", "lanes"), [("crosspool", 2), ("crosspool", 3), ("static", 1), ("elastic", 1), ("swap", 1)]
)
def test_what_attention_keeps_of_partial_results_on_a_card_is_no_room_for_kv(system, lanes, name):
    """Of as many bytes a card has less KV than a core, by what a step takes on 132 multiprocessors, once a lane."""
    model = ServedModel(published_spec(name), Path(), "bfloat16")
    sizes, attention = (4, 256), model.spec.attention
    options = {"max_batch": sizes[0], "prefill_chunk": sizes[1], "page_bytes": PAGE_BYTES}
    if system == "crosspool":
        options["lanes"] = lanes

    def kv_bytes(kind):
        devices = [
            Device(f"{kind}{index}", kind, index, 80 << 30) for index in range(2 if system == "crosspool" else 1)
        ]
        return registry.create(system, options).plan(Cluster(tuple(devices)), [model], Demand()).devices[0].kv_bytes

    if isinstance(attention, MLASpec):
        scratch_bytes = mla_scratch_bytes(*sizes, attention.num_heads, attention.kv_rank, 132)
    else:
        scratch_bytes = gqa_scratch_bytes(*sizes, attention.num_heads, attention.num_kv_heads, attention.head_dim, 132)
    assert kv_bytes("cpu") - kv_bytes("cuda") >= lanes * scratch_bytes - PAGE_BYTES > PAGE_BYTES


def cuda_two() -> Cluster:
    return Cluster(tuple(Device(f"gpu{index}", "cuda", index, 1 << 30) for index in range(2)))


@pytest.mark.parametrize(
    ("control", "cards", "said"),
    [("resident", (0, 1, 2), "whole or dealt out by layer"), ("lowered", (0, 1, 1), "a card each")],
)
def test_slices_of_a_layer_want_a_card_each_and_launched_graphs(model, control, cards, said):
    system = CrossPool(CrossPoolOptions(page_bytes=2 << 20, ffn_sharding="tensor", control=control))
    devices = tuple(Device(f"gpu{i}", "cuda", card, 1 << 30) for i, card in enumerate(cards))
    with pytest.raises(UserError, match=said):
        system.start(system.plan(Cluster(devices), [model], Demand()))
    system.stop()


class Recording:
    """A backend that keeps what its workers are told, and whose workers do nothing."""

    name, clock = "real", MonotonicClock()

    def __init__(self):
        self.roles = {}

    def start_worker(self, name, core, role, inherited_fds, timeline):
        self.roles[name] = role
        return SimpleNamespace(name=name, wait_ready=lambda deadline_s: None, stop=lambda: None)


def roles_of(system, placement):
    backend = Recording()
    try:
        system.start(placement, backend)
    finally:
        system.stop()
    return backend.roles


def test_quotas_share_one_pool_of_a_card(models):
    system = registry.create("quota", {"page_bytes": PAGE_BYTES, "quotas": {"mixtral": 0.75, "qwen3_moe": 0.25}})
    placement = system.plan(CARD, models, Demand())
    (role,) = roles_of(system, placement).values()
    (pool,) = role.pools
    assert role.device.kind == "cuda" and role.lanes == 1 and role.growth == "preempt" and role.prefill_first
    assert pool.models == (0, 1) and pool.page_bytes == PAGE_BYTES
    assert 0 < pool.num_pages * PAGE_BYTES == placement.devices[0].kv_bytes < CARD.memory_bytes
    assert dict(zip([model.name for model in role.models], role.quotas.shares, strict=True)) == system.options.quotas


@pytest.mark.parametrize("idle_evict_s", [0, 45])
def test_weights_that_may_leave_lie_in_pages_that_engines_lend_each_other(idle_evict_s, models):
    system = registry.create("elastic-placement", {"page_bytes": PAGE_BYTES, "idle_evict_s": idle_evict_s})
    placement = system.plan(CARD, models, Demand())
    (plan,) = placement.devices
    roles = list(roles_of(system, placement).values())
    assert [role.lent.engine for role in roles] == [0, 1]
    assert {role.evict_idle_s for role in roles} == {idle_evict_s}
    shape = roles[0].lent.shape
    weights_bytes = {model.name: placed_bytes(model, "cuda", PAGE_BYTES) for model in models}
    assert (plan.weights_bytes == weights_bytes) == bool(idle_evict_s)
    in_pages = sum(weights_bytes.values()) if idle_evict_s else 0
    assert shape.num_pages * PAGE_BYTES == plan.kv_bytes + in_pages
    assert shape.capacity_bytes == CARD.memory_bytes - shape.num_pages * PAGE_BYTES
    left_bytes = 0 if idle_evict_s else sum(plan.weights_bytes.values())
    assert shape.capacity_bytes >= left_bytes, "what is not in pages is charged beside them"


def test_a_host_without_room_for_the_copies_of_weights_says_so(models, monkeypatch):
    monkeypatch.setattr("serving.memory.host.available_bytes", lambda: 1 << 20)
    system = registry.create("elastic-placement", {"page_bytes": PAGE_BYTES})
    placement = system.plan(CARD, models, Demand())
    with pytest.raises(
        CapacityError, match=r"idle_evict_s 0 .* need 64.0 MiB of host memory and 1.0 MiB are available"
    ):
        roles_of(system, placement)
    roles_of(registry.create("elastic-placement", {"page_bytes": PAGE_BYTES, "idle_evict_s": 0}), placement)


@without_card
def test_a_card_that_is_not_there_is_named():
    with pytest.raises(UserError, match="sees no card"):
        cuda_cluster(1, 1 << 30)
    with pytest.raises(UserError, match="gpu3 is card 3"):
        card(Device("gpu3", "cuda", 3, 1 << 30))


def test_structures_have_the_sizes_of_the_driver():
    """CUmemAllocationProp and CUmemAccessDesc of cuda.h, 64 bit."""
    assert ctypes.sizeof(driver._AllocationProperties) == 32
    assert ctypes.sizeof(driver._AccessDescriptor) == 12


def test_bytes_crossed_counts_both_ways():
    assert bytes_crossed(rows=3, hidden=2048, layers=48, element_bytes=2) == 2 * 3 * 2048 * 48 * 2
