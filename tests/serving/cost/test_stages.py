"""Operator and stage costs with the shipped coefficients: orders of magnitude, monotony, parallelism, contention, transfers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.cost.contention import (
    Contention,
    Load,
    host_bandwidth_slowdowns,
    neighbour_slowdown,
    slice_wait_s,
    slowdowns,
)
from serving.cost.fitted_set import fitted_set, read_fitted, shipped
from serving.cost.hardware import load_hardware
from serving.cost.operators import KERNEL_CHOICE, CostModel, rounded
from serving.cost.stages import StageCosts
from serving.cost.table1 import PAPER_KV_KIB, published_spec
from serving.cost.transfers import crossing, host_copy_s, launched_s, page_map_s, page_unmap_s, weight_load_s
from serving.errors import UserError

pytestmark = pytest.mark.cpu

CARDS = ("a100-40gb", "a100-80gb", "h100", "h200", "h20", "l40s")
H200 = load_hardware("h200")


@pytest.fixture(scope="module")
def costs():
    return {card: CostModel(load_hardware(card)) for card in CARDS}


@pytest.mark.parametrize("name", sorted(PAPER_KV_KIB))
@pytest.mark.parametrize("card", CARDS)
def test_a_decode_step_is_above_the_bandwidth_floor_and_below_ten_of_it(costs, card, name):
    stages = StageCosts(published_spec(name), costs[card])
    step = stages.decode_step(4, 4 * 1024)
    floor = step.work.bytes / costs[card].hardware.memory_bandwidth
    assert floor < step.device_s < 10 * floor


def test_measured_reference_points_of_the_h200(costs):
    moe_us = costs["h200"].moe_s(1, 2048, 768, 8, 128) * 1e6
    assert moe_us == pytest.approx(37, rel=0.25)
    mixtral_us = costs["h200"].moe_s(4, 4096, 14336, 2, 8, "balanced") * 1e6
    assert mixtral_us == pytest.approx(663, rel=0.15)


def test_the_paper_scale_step_times_are_milliseconds(costs):
    qwen = StageCosts(published_spec("qwen3-30b-a3b"), costs["a100-40gb"])
    assert 5e-3 < qwen.decode_step(1, 1024).device_s < 20e-3


@pytest.mark.parametrize("name", ["qwen3-30b-a3b", "glm-4.7-flash"])
def test_more_context_more_batch_and_less_parallelism_cost_more(costs, name):
    stages = StageCosts(published_spec(name), costs["h200"])
    assert stages.attention(1, 100_000).device_s > stages.attention(1, 1000).device_s
    assert stages.ffn(2, 16).device_s > stages.ffn(2, 1).device_s
    assert stages.prefill_step(2048).device_s > stages.prefill_step(1024).device_s
    halved = StageCosts(published_spec(name), costs["h200"], tp=2)
    assert halved.ffn(2, 16).work.weight_bytes < stages.ffn(2, 16).work.weight_bytes


def test_a_step_is_the_sum_of_its_stages(costs):
    spec = published_spec("deepseek-v2-lite")
    stages = StageCosts(spec, costs["h200"])
    parts = [stages.attention(2, 4096), *(stages.ffn(i, 2) for i in range(spec.num_layers))]
    assert spec.is_dense(0) and stages.ffn(0, 2) != stages.ffn(1, 2)
    total = stages.embedding(2).device_s + stages.head(2).device_s + 27 * parts[0].device_s
    total += sum(part.device_s for part in parts[1:])
    assert stages.decode_step(2, 4096).device_s == pytest.approx(total)


def test_a_chunked_prompt_costs_at_least_the_whole(costs):
    stages = StageCosts(published_spec("qwen3-30b-a3b"), costs["h200"])
    chunks = sum(stages.prefill_attention(1024, past).device_s for past in range(0, 4096, 1024))
    assert chunks > 0.95 * stages.prefill_attention(4096).device_s


def test_heads_that_cannot_be_cut_are_refused_where_attention_is_asked_for(costs):
    stages = StageCosts(published_spec("glm-4.7-flash"), costs["h200"], tp=8)
    assert stages.ffn(2, 4).device_s > 0
    with pytest.raises(UserError, match="20 attention heads cannot be cut into 8 parts"):
        stages.attention(1, 1000)


def test_one_card_needs_no_all_reduce(costs):
    assert costs["h200"].all_reduce_s(4096, 1) == 0
    assert 4e-6 < costs["h200"].all_reduce_s(4096, 2) < 7e-6


def test_a_head_width_never_measured_borrows_the_nearest(costs):
    assert costs["a100-80gb"].variant("decode_attention", "d64") == "flash_attention/d128"
    assert costs["h200"].variant("decode_attention", "d96") in ("fa3/d64", "fa3/d128")


def test_a_kernel_without_coefficients_names_the_known_ones():
    model = CostModel(H200, kernels={"moe": "mine"})
    with pytest.raises(UserError, match="no fitted moe 'mine/t64'; known: .*sglang_fused_moe_triton/t64"):
        model.moe_s(1, 2048, 768, 8, 128)


@pytest.mark.parametrize("card", sorted(KERNEL_CHOICE))
def test_every_chosen_kernel_was_fitted(card):
    known = {(operator, variant.split("/")[0]) for operator, variant in shipped(card).variants}
    assert set(KERNEL_CHOICE[card].items()) <= known


def test_shipped_coefficients_say_where_they_come_from():
    provenance = shipped("h200").provenance
    assert provenance["rows"] == "fitting half"
    assert all(len(entry["sha256"]) == 64 and entry["rows"] > 0 for entry in provenance["files"])


def test_an_unknown_fit_lists_the_known_ones():
    with pytest.raises(UserError, match="no fitted coefficients for 'b300'; known: a100-80gb, h200"):
        shipped("b300")


def test_fitted_sets_survive_a_file(tmp_path):
    original = shipped("h200")
    original.write(tmp_path / "again.json")
    again = read_fitted(tmp_path / "again.json")
    assert again == original == fitted_set(original.card, original.variants.values(), original.provenance)
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(UserError, match="broken.json: not a file of fitted coefficients"):
        read_fitted(tmp_path / "broken.json")
    with pytest.raises(UserError, match="no such file"):
        read_fitted(tmp_path / "none.json")


@given(tokens=st.integers(1, 10_000_000))
def test_rounding_of_contexts_stays_within_one_percent(tokens):
    assert abs(rounded(tokens) - tokens) <= 0.008 * tokens


# -- contention --------------------------------------------------------------------------------------------------------
MEMORY_BOUND = Load(alone_s=100e-6, bytes=0.9 * 100e-6 * H200.memory_bandwidth, flops=0.0)
LATENCY_BOUND = Load(alone_s=20e-6, bytes=0.05 * 20e-6 * H200.memory_bandwidth, flops=0.0)


def test_alone_nothing_is_stretched():
    for mode in ("share", "time_slice"):
        assert slowdowns([MEMORY_BOUND], H200, Contention(mode)) == [1.0]


def test_two_memory_bound_kernels_halve_each_other_and_spare_latency_bound_ones():
    fair = Contention(interference=0.0)
    pair = slowdowns([MEMORY_BOUND, MEMORY_BOUND], H200, fair)
    assert pair == [pytest.approx(1 + 0.9 * 0.8)] * 2
    mixed = slowdowns([MEMORY_BOUND, LATENCY_BOUND], H200, fair)
    assert mixed == [1.0, 1.0]
    crowd = slowdowns([MEMORY_BOUND, MEMORY_BOUND, LATENCY_BOUND], H200, fair)
    assert crowd[2] < 1.1 < crowd[0]


def test_arithmetic_is_shared_too():
    busy = Load(100e-6, 0.0, 100e-6 * H200.bf16_flops)
    assert slowdowns([busy, busy], H200, Contention(interference=0.0)) == [2.0, 2.0]


def test_interference_costs_every_neighbour():
    assert slowdowns([LATENCY_BOUND] * 3, H200, Contention(interference=0.1)) == [pytest.approx(1.2)] * 3


def test_time_slices_divide_the_device_and_make_a_newcomer_wait():
    sliced = Contention("time_slice", slice_s=2e-3, switch_s=0.0)
    assert slowdowns([LATENCY_BOUND] * 4, H200, sliced) == [4.0] * 4
    assert slice_wait_s(4, sliced) == pytest.approx(3e-3)
    assert slice_wait_s(1, sliced) == slice_wait_s(4, Contention()) == 0.0


@given(shares=st.lists(st.floats(0, 1), min_size=2, max_size=8), more=st.floats(0, 1))
def test_another_engine_never_speeds_anyone_up(shares, more):
    loads = [Load(1e-4, share * 1e-4 * H200.memory_bandwidth, 0.0) for share in shares]
    extra = Load(1e-4, more * 1e-4 * H200.memory_bandwidth, 0.0)
    before = slowdowns(loads, H200, Contention())
    after = slowdowns([*loads, extra], H200, Contention())
    assert all(b <= a for b, a in zip(before, after, strict=False))
    assert min(before) >= 1.0


def test_cores_that_share_memory_stretch_each_other():
    core = load_hardware("cpu2")
    streaming = Load(1e-3, 1e-3 * core.memory_bandwidth, 0.0)
    assert host_bandwidth_slowdowns([streaming], core) == [1.0]
    assert host_bandwidth_slowdowns([streaming] * 4, core)[0] == pytest.approx(4 * 13 / 27.5)
    assert host_bandwidth_slowdowns([streaming] * 4, H200) == [1.0] * 4


def test_a_measured_neighbour_counts_in_proportion_to_what_it_draws():
    core = load_hardware("cpu2")
    streaming, idle = Load(1e-3, 1e-3 * core.memory_bandwidth, 0.0), Load(1e-3, 0.0, 1e6)
    assert neighbour_slowdown(1.6, [streaming], core) == pytest.approx(1.6)
    assert neighbour_slowdown(1.6, [idle], core) == neighbour_slowdown(1.6, [], core) == 1.0
    assert neighbour_slowdown(1.0, [streaming], core) == 1.0


def test_bad_contention_is_refused():
    with pytest.raises(UserError, match="unknown contention mode 'fair'; known: share, time_slice"):
        Contention("fair")
    with pytest.raises(UserError, match="must not be negative"):
        Contention(interference=-0.1)


# -- transfers ---------------------------------------------------------------------------------------------------------
def test_a_lowered_crossing_needs_no_host_and_is_latency_not_bandwidth():
    lowered, relayed = crossing(H200, 4096, lowered=True), crossing(H200, 4096, lowered=False)
    assert lowered.host_s == 0.0 < relayed.host_s
    assert lowered.latency_s == pytest.approx(4.5e-6, rel=0.01)
    assert relayed.latency_s > 4 * lowered.latency_s
    assert crossing(H200, 4096, True, same_node=False).latency_s > lowered.latency_s


def test_swap_floors_of_the_literature():
    assert weight_load_s(H200, 93.4e9, share=1.0) == pytest.approx(1.7, rel=0.02)  # Mixtral-8x7B at 55 GB/s
    assert weight_load_s(H200, 32.8e9, share=1.0) == pytest.approx(0.6, rel=0.02)  # DeepSeek-MoE-16B
    assert host_copy_s(H200, 55e9) == pytest.approx(1.0, rel=0.01)


def test_pages_cost_what_was_measured_on_an_a100():
    card = load_hardware("a100-40gb")
    assert page_map_s(card, 1) == pytest.approx(37.5e-6)
    assert page_map_s(card, 10, created=False) == pytest.approx(2305e-6)
    assert page_unmap_s(card, 2) == pytest.approx(52e-6)


def test_eager_launches_bind_only_small_kernels():
    assert launched_s(H200, 10e-6, 10, graph=False) == pytest.approx(50e-6)
    assert launched_s(H200, 1e-3, 10, graph=False) == 1e-3
    assert launched_s(H200, 10e-6, 10, graph=True) == pytest.approx(11e-6)
