"""The CPU's own forms against the plain references: odd sizes, ragged runs, packed and plain weights."""

from __future__ import annotations

import pytest
import torch

from kernels import attention, dense_ffn, mla, moe_ffn, rms_norm, rope, router
from kernels.attention import reference as gqa_reference
from kernels.dense_ffn import reference as dense_reference
from kernels.linear import linear, pack, packed_bytes
from kernels.mla import reference as mla_reference
from kernels.moe_ffn import reference as moe_reference
from kernels.paged_kv import PagedKV
from kernels.rms_norm import reference as norm_reference
from kernels.rope import reference as rope_reference
from kernels.rope.cpu import adjacent_pairs, rotate_pairs_
from kernels.router import reference as router_reference

pytestmark = pytest.mark.cpu

# heads, KV heads, dim
GQA_SHAPES = [(4, 2, 16), (6, 6, 10), (9, 1, 24)]
# tokens in the cache of each sequence, and how many of them are this step's
CHUNKS = {
    "one_token": ((1,), (1,)),
    "whole": ((37,), (37,)),
    "ragged": ((70, 64, 9, 1), (11, 64, 1, 1)),
}


def runs(lengths, entry: tuple[int, ...], dtype) -> PagedKV:
    """Each sequence one run of slots, in reverse order, with slots of NaN between."""
    starts, used = [0] * len(lengths), 3
    for sequence in reversed(range(len(lengths))):
        starts[sequence] = used
        used += lengths[sequence] + 2
    cache = torch.full((used, *entry), float("nan"))
    for start, length in zip(starts, lengths, strict=True):
        cache[start : start + length] = torch.randn(length, *entry)
    return PagedKV(cache.to(dtype), 1, None, None, tuple(starts), tuple(lengths))


@pytest.mark.parametrize("shape", [(1, 8), (3, 20), (2, 5, 200)], ids=str)
def test_rms_norm(shape, dtype, check):
    x, residual = torch.randn(2, *shape).to(dtype) / 300  # small rows: eps matters
    weight = torch.randn(shape[-1]).to(dtype)
    check("normed", rms_norm.rms_norm(x, weight, 1e-5), norm_reference.rms_norm(x, weight, 1e-5))
    actual, expected = (form.add_rms_norm(x, residual, weight, 1e-6) for form in (rms_norm, norm_reference))
    check("normed", actual[0], expected[0])
    check("sum", actual[1], expected[1])


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
def test_rope_write(interleaved, dtype, check):
    tokens, heads, kv_heads, dim, rank = 5, 6, 2, 12, 7
    q, k, v = torch.randn(tokens, heads + 2 * kv_heads, dim).to(dtype).split([heads, kv_heads, kv_heads], dim=1)
    latent, key = torch.randn(tokens, rank + dim).to(dtype).split([rank, dim], dim=1)
    angle = torch.rand(11, dim // 2) * 6.28
    positions = torch.tensor([0, 10, 3, 3, 7], dtype=torch.int32)
    slots = torch.tensor([9, 0, 4, 12, 1])
    place = (angle.cos(), angle.sin(), positions)
    gqa, latents = torch.zeros(2, 13, 2, kv_heads, dim).to(dtype), torch.zeros(2, 13, rank + dim).to(dtype)
    for name, cache, write in (
        ("gqa", gqa, lambda form, cache: form.rope_write_gqa(q, k, v, *place, cache, slots, interleaved)),
        ("mla", latents, lambda form, cache: form.rope_write_mla(q, latent, key, *place, cache, slots, interleaved)),
    ):
        check(f"{name} q", write(rope, cache[0]), write(rope_reference, cache[1]))
        check(f"{name} cache", cache[0], cache[1])


@pytest.mark.parametrize("offset", [0, 1, 4], ids=["whole", "odd_offset", "even_offset"])
def test_adjacent_pairs_turn_as_halves_do(offset, dtype, check):
    """Channels permuted by `adjacent_pairs` and turned as pairs are the channels turned as halves, permuted."""
    tokens, heads, dim = 3, 2, 8
    x = torch.randn(tokens, heads, dim).to(dtype)
    angle = torch.rand(tokens, dim // 2) * 6.28

    def permuted(tensor):
        return adjacent_pairs(tensor.transpose(0, 1).reshape(heads, tokens, dim).transpose(1, 2).flatten(0, 1), dim)

    def back(tensor):
        return tensor.view(heads, dim, tokens).permute(2, 0, 1)

    expected = rope_reference.rotate(x, angle.cos(), angle.sin(), torch.arange(tokens), interleaved=False)
    wide = torch.zeros(tokens, heads, dim + offset).to(dtype)
    actual = wide[..., offset:]
    actual.copy_(back(permuted(x)))
    rotate_pairs_(actual, torch.polar(torch.ones_like(angle), angle).unsqueeze(1))
    check("turned", actual, back(permuted(expected)))
    assert not wide[..., :offset].any()


@pytest.mark.parametrize(("lengths", "rows"), CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), GQA_SHAPES)
def test_gqa(heads, kv_heads, dim, lengths, rows, dtype, check):
    kv = runs(lengths, (2, kv_heads, dim), dtype)
    fused = torch.randn(sum(rows), heads + 3, dim).to(dtype)
    q = fused[:, :heads]  # as it lies in the product of Q, K and V
    check("prefill", attention.prefill_gqa(q, kv, rows, 0.3), gqa_reference.prefill_gqa(q, kv, rows, 0.3))
    q = q[: len(lengths)]
    check("decode", attention.decode_gqa(q, kv, 0.3), gqa_reference.decode_gqa(q, kv, 0.3))


def test_gqa_over_blocks_that_are_no_run(dtype, check):
    lengths = (9, 4)
    cache = torch.randn(20, 2, 2, 8).to(dtype)
    table = torch.tensor([[3, 0, 4], [1, 0, 0]], dtype=torch.int32)
    kv = PagedKV(cache, 4, table, torch.tensor(lengths, dtype=torch.int32))
    q = torch.randn(2, 4, 8).to(dtype)
    check("out", attention.decode_gqa(q, kv, 0.3), gqa_reference.decode_gqa(q, kv, 0.3))


@pytest.mark.parametrize(("lengths", "rows"), CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize(("heads", "rank", "rope_dim"), [(4, 32, 8), (5, 24, 4)])
def test_mla(heads, rank, rope_dim, lengths, rows, dtype, check):
    kv = runs(lengths, (rank + rope_dim,), dtype)
    q_latent = torch.randn(sum(rows), heads, rank).to(dtype)
    q_rope = torch.randn(sum(rows), heads, rope_dim).to(dtype)
    expected = mla_reference.prefill_mla(q_latent, q_rope, kv, rows, 0.2)
    check("prefill", mla.prefill_mla(q_latent, q_rope, kv, rows, 0.2), expected)
    queries = (q_latent[: len(lengths)], q_rope[: len(lengths)])
    check("decode", mla.decode_mla(*queries, kv, 0.2), mla_reference.decode_mla(*queries, kv, 0.2))


@pytest.mark.parametrize("scale", [1.0, 1.8])
@pytest.mark.parametrize("groups", [(1, 1), (3, 2)], ids=["one_group", "best_2_of_3"])
@pytest.mark.parametrize("rule", router_reference.RULES)
def test_route(rule, groups, scale, check):
    logits = torch.randn(7, 12) * 2
    bias = torch.randn(12) if rule == "sigmoid_bias" else None
    actual = router.route(logits, 3, rule, bias, scale, *groups)
    expected = router_reference.route(logits, 3, rule, bias, scale, *groups)
    check("experts", actual[1], expected[1])
    check("weights", actual[0], expected[0])


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 9, 70])
def test_linear_and_dense_ffn(rows, dtype, check):
    gate_up, down = torch.randn(2 * 24, 40).to(dtype) / 6, torch.randn(40, 24).to(dtype) / 5
    x = torch.randn(rows, 40).to(dtype)
    check("linear", linear(x, pack(gate_up)), (x.float() @ gate_up.float().t()).to(dtype))
    expected = dense_reference.dense_ffn(x, gate_up, down)
    check("packed", dense_ffn.dense_ffn(x, pack(gate_up), pack(down)), expected)
    check("plain", dense_ffn.dense_ffn(x, gate_up, down), expected)


@pytest.mark.parametrize("shape", [(40, 24), (63, 31), (64, 32), (65, 33), (300, 100)], ids=str)
def test_packed_bytes_are_the_most_that_onednn_takes(shape, dtype):
    """Whole blocks take what they are; what is padded depends on the processor and on oneDNN's version."""
    taken = torch.ops.mkldnn._nbytes(pack(torch.zeros(shape, dtype=dtype)))
    assert shape[0] * shape[1] * dtype.itemsize <= taken <= packed_bytes(*shape, dtype)
    if shape == (64, 32):
        assert taken == packed_bytes(*shape, dtype)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "plain"])
@pytest.mark.parametrize(
    ("rows", "num_experts", "top_k", "used"),
    [(1, 8, 2, 8), (2, 5, 5, 5), (8, 6, 1, 1), (9, 40, 6, 30), (150, 7, 2, 4), (90, 8, 3, 8)],
)
def test_moe_ffn(rows, num_experts, top_k, used, packed, dtype, check):
    depth, width = 32, 20
    gate_up = torch.randn(num_experts, 2 * width, depth).to(dtype) / 5
    down = torch.randn(num_experts, depth, width).to(dtype) / 5
    chosen = torch.stack([torch.randperm(used)[:top_k] for _ in range(rows)])
    share = torch.rand(rows, top_k)
    x = torch.randn(rows, depth).to(dtype)
    plain = moe_ffn.ExpertWeights(gate_up, down)
    held = moe_ffn.PackedExperts.pack(plain) if packed else plain
    check("out", moe_ffn.moe_ffn(x, held, share, chosen), moe_reference.moe_ffn(x, plain, share, chosen))
