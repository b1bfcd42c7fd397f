"""Model facts from configs: the paper's Table 1 and check figures, and the arithmetic of stages."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.cost import facts
from serving.cost.table1 import (
    PAPER_KV_KIB,
    PAPER_TABLE1,
    check_figures,
    pingpong_batches,
    published_spec,
    table1,
)
from serving.errors import UserError

pytestmark = pytest.mark.cpu

MODELS = sorted(PAPER_KV_KIB)


def test_table_1_of_the_paper_to_its_printed_digits():
    assert tuple(row.printed() for row in table1()) == PAPER_TABLE1


@pytest.mark.parametrize("name", MODELS)
def test_kv_bytes_a_token(name):
    kib = published_spec(name).kv_bytes_per_token("bfloat16") / 1024
    assert round(kib, 1) == PAPER_KV_KIB[name]


def test_derived_check_figures_of_the_paper():
    figures = check_figures()
    assert round(figures["ffn_gb"], 1) == 144.4
    assert round(figures["ffn_gb_per_weights_gpu"], 1) == 36.1
    assert figures["crossing_kib_per_token/qwen3-30b-a3b"] == 4
    assert figures["crossings_per_token/qwen3-30b-a3b"] == 96
    assert figures["weights_gb"] == pytest.approx(154, rel=0.015)  # "about 154 GB"
    assert 25e9 < 40 * 2**30 - figures["kv_side_gb"] * 1e9 < 36e9  # what the KV GPU has left, before workspace


@pytest.mark.parametrize(("kv_heads", "share"), [(4, 1.0), (2, 0.5), (1, 0.25)])
def test_figure_2_of_the_paper(kv_heads, share):
    plan = facts.attention_plan(kv_heads, 4)
    assert plan.kv_share_of_one_request == share
    assert plan.devices == 4


def test_mla_is_one_kv_head_for_sharding():
    assert facts.shardable_kv_heads(published_spec("deepseek-v2-lite")) == 1
    assert facts.shardable_kv_heads(published_spec("qwen3-30b-a3b")) == 4


@pytest.mark.parametrize("name", MODELS)
def test_parts_add_up_to_the_spec(name):
    spec = published_spec(name)
    parts = facts.weight_bytes(spec, "bfloat16")
    assert parts.total == 2 * (spec.total_elements + facts.norm_elements(spec))
    assert parts.ffn == 2 * spec.ffn_elements
    by_layer = sum(
        facts.ffn_work(spec, i, 1, distinct=spec.moe.num_experts).weight_bytes for i in range(spec.num_layers)
    )
    assert by_layer == parts.ffn


@pytest.mark.parametrize("absorbed", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_projections_read_each_attention_weight_once(name, absorbed):
    spec = published_spec(name)
    work = facts.projection_work(spec, 1, absorbed=absorbed)
    assert work.weight_bytes == 2 * spec.attention.weight_elements(spec.hidden_size)
    assert work.flops == 2 * spec.attention.weight_elements(spec.hidden_size)


@pytest.mark.parametrize("name", MODELS)
def test_decode_core_reads_the_kv_once(name):
    spec = published_spec(name)
    work = facts.decode_core_work(spec, batch=3, context_tokens=1000)
    assert work.kv_bytes == 1000 * spec.kv_bytes_per_token_layer("bfloat16")


def test_tensor_parallelism_divides_gqa_kv_and_copies_mlas():
    qwen, lite = published_spec("qwen3-30b-a3b"), published_spec("deepseek-v2-lite")
    assert facts.decode_core_work(qwen, 1, 100, tp=4).kv_bytes * 4 == facts.decode_core_work(qwen, 1, 100).kv_bytes
    assert facts.decode_core_work(lite, 1, 100, tp=4).kv_bytes == facts.decode_core_work(lite, 1, 100).kv_bytes
    with pytest.raises(UserError, match="16 attention heads cannot be cut into 3 parts"):
        facts.decode_core_work(lite, 1, 100, tp=3)


@given(tokens=st.integers(1, 4096))
def test_moe_reads_between_one_tokens_experts_and_all_of_them(tokens):
    spec = published_spec("qwen3-30b-a3b")
    weights = facts.moe_work(spec, tokens).weight_bytes / (2 * spec.expert_elements)
    assert spec.moe.top_k - 1e-6 <= weights <= spec.moe.num_experts + 1e-6


@given(new=st.integers(1, 500), past=st.integers(0, 500))
def test_a_chunk_and_its_prefix_are_the_whole_prompt(new, past):
    spec = published_spec("mixtral-8x7b")
    chunk = facts.prefill_core_work(spec, new, past).flops
    prefix = facts.prefill_core_work(spec, past).flops if past else 0
    assert chunk + prefix == facts.prefill_core_work(spec, new + past).flops


def test_work_adds_and_scales():
    work = facts.Work(1, 2, 3, 4)
    assert (work + work) == work.times(2)
    assert work.bytes == 9
    assert facts.Work(8, 4).intensity == 2
    assert facts.Work().intensity == 0


def test_pingpong_bound():
    assert pingpong_batches(1.0, 0.0) == 2
    assert pingpong_batches(1.0, 0.5) == 3


def test_an_unknown_published_model_lists_the_known_ones():
    with pytest.raises(UserError, match="unknown published model 'gpt-9'.*mixtral-8x7b"):
        published_spec("gpt-9")
