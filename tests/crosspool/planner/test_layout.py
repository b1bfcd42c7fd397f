"""Layouts: every byte lies somewhere, nothing is overcommitted unsaid, what is missing is what would make it fit."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crosspool.planner.layout import FFN_SPLITS, LayoutOptions, ModelBytes, PoolDevice, lay_out, plan_pools
from serving.errors import CapacityError, UserError

pytestmark = pytest.mark.cpu

PAGE = 10


def devices_of(*sizes):
    return [PoolDevice(f"d{i}", size) for i, size in enumerate(sizes)]


model_lists = st.lists(
    st.builds(
        lambda attention, layers, heads, request: (attention, tuple(layers), heads, request),
        st.integers(0, 300),
        st.lists(st.integers(0, 100), min_size=1, max_size=6),
        st.sampled_from([1, 2, 4]),
        st.integers(0, 400),
    ),
    min_size=1,
    max_size=4,
)


@given(
    model_lists,
    st.lists(st.integers(1, 2000), min_size=2, max_size=5),
    st.integers(0, 3000),
    st.sampled_from(FFN_SPLITS),
)
def test_weights_are_conserved_and_overcommitment_is_always_named(rows, sizes, budget_bytes, split):
    models = [ModelBytes(f"m{i}", *row) for i, row in enumerate(rows)]
    kv_devices = max(1, len(sizes) // 2)
    plan = lay_out(devices_of(*sizes), models, budget_bytes, PAGE, LayoutOptions(kv_devices, split, 5, 3))
    for model in models:
        ffn = sum(load.weights_bytes.get(model.name, 0) for load in plan.weights)
        slack = len(plan.weights) * len(model.ffn_layer_bytes) if split == "even" else 0
        assert model.ffn_bytes <= ffn <= model.ffn_bytes + slack
        copies = sum(load.weights_bytes[model.name] for load in plan.kv)
        assert copies >= model.attention_bytes * plan.parallel[model.name].weight_copies
        assert len(plan.ffn_of[model.name]) == len(model.ffn_layer_bytes)
    overcommitted = {load.device.name for load in (*plan.kv, *plan.weights) if load.free_bytes < 0}
    assert overcommitted == {s.where for s in plan.shortfalls if s.where != "kv-pool"}
    assert all(s.missing_bytes > 0 for s in plan.shortfalls)
    assert (plan.kv_bytes < budget_bytes) == any("budget" in s.what for s in plan.shortfalls)
    assert all(load.kv_bytes % PAGE == 0 for load in plan.kv)


def test_the_missing_bytes_are_what_would_make_it_fit():
    models = [ModelBytes("a", 100, (60, 70)), ModelBytes("b", 50, (90,))]
    with pytest.raises(CapacityError, match=r"d1: FFN weights and workspace do not fit; 20 bytes") as caught:
        plan_pools(devices_of(400, 200), models, 100, PAGE, LayoutOptions())
    assert "d1" in str(caught.value)
    with pytest.raises(CapacityError, match=r"kv-pool: .*budget is 100 B; 10 bytes"):
        plan_pools(devices_of(240, 220), models, 100, PAGE, LayoutOptions())
    plan = plan_pools(devices_of(250, 220), models, 100, PAGE, LayoutOptions())
    assert plan.kv_bytes == 100
    assert [load.free_bytes for load in (*plan.kv, *plan.weights)] == [0, 0]


def test_a_request_sees_only_its_share_of_the_pool():
    one_head, four_heads = ModelBytes("mla", 0, (1,), 1, 150), ModelBytes("mha", 0, (1,), 4, 150)
    plan = lay_out(devices_of(100, 100, 100), [one_head, four_heads], 0, PAGE, LayoutOptions(kv_devices=2))
    assert (plan.request_bytes("mla"), plan.request_bytes("mha")) == (100, 200)
    assert [str(s) for s in plan.shortfalls] == [
        "kv-pool: one request of mla needs 150 B and sees 1/2 of the KV; 50 bytes (50 B) are missing"
    ]


def test_splits_spread_the_ffn_over_the_weights_pool():
    model = [ModelBytes("a", 0, (10, 10, 10, 10))]
    spread = {}
    for split in FFN_SPLITS:
        plan = lay_out(devices_of(100, 100, 100), model, 0, PAGE, LayoutOptions(1, split))
        spread[split] = [load.weights_bytes.get("a", 0) for load in plan.weights], plan.ffn_of["a"]
    assert spread["whole"] == ([40, 0], (0, 0, 0, 0))
    assert spread["layers"] == ([20, 20], (0, 1, 0, 1))
    assert spread["even"] == ([20, 20], (-1, -1, -1, -1))


def test_two_pools_need_two_devices_and_known_splits():
    with pytest.raises(UserError, match="cannot form two pools"):
        lay_out(devices_of(10), [ModelBytes("a", 1, (1,))], 0, PAGE, LayoutOptions())
    with pytest.raises(UserError, match="unknown ffn_split"):
        LayoutOptions(ffn_split="by magic")
