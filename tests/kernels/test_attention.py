"""Decode and prefill attention over pages, GQA and MLA, against their references: ragged lengths, page edges, odd heads."""

from __future__ import annotations

import pytest
import torch

from kernels.attention import reference as gqa_reference
from kernels.mla import reference as mla_reference
from kernels.paged_kv import PagedKV

pytestmark = pytest.mark.cpu

RAGGED = {"one_token": (1,), "page_edges": (64, 63, 65), "ragged": (3, 400, 1)}
# heads, KV heads, dim, tokens of a block: a block of 48 is no multiple of a tile, so every token is looked up
SHAPES = [(4, 2, 16, 64), (6, 2, 24, 48)]
MLA_SHAPES = [(4, 32, 8, 64), (20, 24, 4, 48)]  # heads, rank, rope dim, tokens of a block
GLM_HEADS = 20  # query heads of GLM-4.7-Flash: no power of two


def paged(lengths, entry: tuple[int, ...], block_tokens: int, dtype, device) -> PagedKV:
    """A cache of random entries whose sequences lie in shuffled blocks; what no sequence owns is NaN."""
    blocks = [-(-length // block_tokens) for length in lengths]
    order = (torch.randperm(sum(blocks)) + 1).tolist()
    table = torch.zeros(len(lengths), max(blocks), dtype=torch.int32)
    cache = torch.full(((sum(blocks) + 2) * block_tokens, *entry), float("nan"))
    for sequence, (length, count) in enumerate(zip(lengths, blocks, strict=True)):
        mine = [order.pop() for _ in range(count)]
        table[sequence, :count] = torch.tensor(mine)
        token = torch.arange(length)
        slots = torch.tensor(mine)[token // block_tokens] * block_tokens + token % block_tokens
        cache[slots] = torch.randn(length, *entry)
    lens = torch.tensor(lengths, dtype=torch.int32, device=device)
    return PagedKV(cache.to(device, dtype), block_tokens, table.to(device), lens)


@pytest.mark.parametrize("lengths", RAGGED.values(), ids=RAGGED)
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "block_tokens"), SHAPES)
def test_decode_gqa(heads, kv_heads, dim, lengths, block_tokens, dtype, device, check):
    from kernels.attention import triton as form

    kv = paged(lengths, (2, kv_heads, dim), block_tokens, dtype, device)
    q = torch.randn(len(lengths), heads, dim, dtype=dtype, device=device)
    check("out", form.decode_gqa(q, kv, dim**-0.5), gqa_reference.decode_gqa(q, kv, dim**-0.5))


@pytest.mark.parametrize("lengths", [(600,), (64, 2)], ids=["split", "whole"])
def test_decode_mha_of_20_heads(lengths, device, check):
    from kernels.attention import triton as form

    kv = paged(lengths, (2, GLM_HEADS, 8), 64, torch.float32, device)
    q = torch.randn(len(lengths), GLM_HEADS, 8, device=device)
    check("out", form.decode_gqa(q, kv, 0.3), gqa_reference.decode_gqa(q, kv, 0.3))


@pytest.mark.parametrize("dim", [128, 192])
def test_one_long_sequence_is_joined_in_slices_of_its_channels(dim, device, check):
    """Where rows are few, a row's channels are dealt out; 192 channels leave the last slice half empty."""
    from kernels.attention import triton as form
    from kernels.attention.split import combine_slice
    from kernels.launch import num_sms

    assert combine_slice(2, 256, num_sms(torch.device("cpu"))) == 128
    kv = paged((600,), (2, 1, dim), 64, torch.float32, device)
    q = torch.randn(1, 2, dim, device=device)
    check("out", form.decode_gqa(q, kv, dim**-0.5), gqa_reference.decode_gqa(q, kv, dim**-0.5))


@pytest.mark.parametrize(
    ("lengths", "rows"),
    [((1,), (1,)), ((70, 64, 9), (70, 3, 1)), ((130, 20), (40, 1))],
    ids=["one_token", "whole_and_chunks", "second_chunk"],
)
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "block_tokens"), SHAPES)
def test_prefill_gqa(heads, kv_heads, dim, lengths, rows, block_tokens, dtype, device, check):
    from kernels.attention import triton as form

    kv = paged(lengths, (2, kv_heads, dim), block_tokens, dtype, device)
    q = torch.randn(sum(rows), heads, dim, dtype=dtype, device=device)
    check("out", form.prefill_gqa(q, kv, rows, dim**-0.5), gqa_reference.prefill_gqa(q, kv, rows, dim**-0.5))


LONG_PREFIXES = {
    "one_tile_cut": ((700,), (3,)),
    "idle_rows_and_a_short_neighbour": ((650, 5), (21, 9)),
    "as_many_tiles_as_programs": ((900, 40, 610), (9, 3, 8)),
}


@pytest.mark.parametrize(("lengths", "rows"), LONG_PREFIXES.values(), ids=LONG_PREFIXES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "block_tokens"), [*SHAPES, (5, 1, 80, 64)])
def test_prefill_gqa_after_a_long_prefix(heads, kv_heads, dim, lengths, rows, block_tokens, device, check):
    """Tiles of few rows are cut among programs, and joined."""
    from kernels.attention import triton as form

    kv = paged(lengths, (2, kv_heads, dim), block_tokens, torch.float32, device)
    q = torch.randn(sum(rows), heads, dim, device=device)
    out = form.prefill_gqa(q, kv, rows, dim**-0.5).split(rows)
    known = [slice(max(0, count - length), None) for length, count in zip(lengths, rows, strict=True)]  # not idle
    real = tuple(min(length, count) for length, count in zip(lengths, rows, strict=True))
    wanted = torch.cat([part[mine] for part, mine in zip(q.split(rows), known, strict=True)])
    given = torch.cat([part[mine] for part, mine in zip(out, known, strict=True)])
    assert torch.cat(out).isfinite().all()
    check("out", given, gqa_reference.prefill_gqa(wanted, kv, real, dim**-0.5))


@pytest.mark.parametrize(("lengths", "rows"), LONG_PREFIXES.values(), ids=LONG_PREFIXES)
def test_prefill_mla_after_a_long_prefix(lengths, rows, dtype, device, check):
    """Both ways to a step's scores: in a branch for bfloat16, without for float32."""
    from kernels.mla import triton as form

    kv = paged(lengths, (24 + 4,), 48, dtype, device)
    latent, turned = torch.randn(sum(rows), 5, 28, device=device).to(dtype).split([24, 4], dim=-1)
    out = form.prefill_mla(latent, turned, kv, rows, 0.2).split(rows)
    known = [slice(max(0, count - length), None) for length, count in zip(lengths, rows, strict=True)]  # not idle
    real = tuple(min(length, count) for length, count in zip(lengths, rows, strict=True))
    wanted = [torch.cat([x[mine] for x, mine in zip(q.split(rows), known, strict=True)]) for q in (latent, turned)]
    given = torch.cat([part[mine] for part, mine in zip(out, known, strict=True)])
    assert torch.cat(out).isfinite().all()
    check("o_latent", given, mla_reference.prefill_mla(*wanted, kv, real, 0.2))


@pytest.mark.parametrize(("length", "cut"), [(20, False), (2000, True)], ids=["short", "long"])
def test_only_tiles_after_a_long_prefix_are_cut(length, cut, device, monkeypatch):
    """The plan is the same for both: what decides is on the device. Without the joining kernel, what was cut is missing."""
    from kernels.attention import triton as form
    from kernels.attention.shares import SharePlan

    kv = paged((2000,), (2, 2, 16), 64, torch.float32, device)
    kv = PagedKV(kv.cache, 64, kv.block_table, torch.tensor([length], dtype=torch.int32, device=device))
    q = torch.randn(20, 4, 16, device=device)
    monkeypatch.setattr(SharePlan, "join", lambda plan, out: None)
    expected = gqa_reference.prefill_gqa(q, kv, (20,), 0.25)
    same = torch.isclose(form.prefill_gqa(q, kv, (20,), 0.25), expected, atol=1e-4).all()
    assert bool(same) == (not cut)


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(3, 3, 4), (5, 1, 8), (6, 2, 12)])
def test_heads_narrower_than_a_card_multiplies(heads, kv_heads, dim, device, check):
    from kernels.attention import triton as form

    kv = paged((70, 5), (2, kv_heads, dim), 64, torch.float32, device)
    q = torch.randn(2, heads, dim, device=device)
    check("decode", form.decode_gqa(q, kv, 0.3), gqa_reference.decode_gqa(q, kv, 0.3))
    rows = torch.randn(14, heads, dim, device=device)
    check("prefill", form.prefill_gqa(rows, kv, (9, 5), 0.3), gqa_reference.prefill_gqa(rows, kv, (9, 5), 0.3))


def test_a_row_without_tokens_gives_zeros(device):
    """Rows that pad a batch to a graph's size have length 0: their output must be finite."""
    from kernels.attention import triton as form

    kv = paged((5, 1), (2, 1, 16), 64, torch.float32, device)
    kv = PagedKV(kv.cache, 64, kv.block_table, torch.tensor([5, 0], dtype=torch.int32, device=device))
    assert not form.decode_gqa(torch.randn(2, 2, 16, device=device), kv, 0.25)[1].any()


@pytest.mark.parametrize("length", [3, 70])
def test_rows_before_the_first_token_leave_the_others_alone(length, device, check):
    """A chunk of a graph's size has idle rows before the real ones: finite, and nobody's business."""
    from kernels.attention import triton as gqa_form
    from kernels.mla import triton as mla_form

    rows = 96
    kv = paged((length,), (2, 2, 16), 64, torch.float32, device)
    q = torch.randn(rows, 4, 16, device=device)
    out = gqa_form.prefill_gqa(q, kv, (rows,), 0.25)
    assert out.isfinite().all()
    check("gqa", out[-length:], gqa_reference.prefill_gqa(q[-length:], kv, (length,), 0.25))
    kv = paged((length,), (40,), 64, torch.float32, device)
    latent, turned = torch.randn(rows, 4, 32, device=device), torch.randn(rows, 4, 8, device=device)
    out = mla_form.prefill_mla(latent, turned, kv, (rows,), 0.2)
    assert out.isfinite().all()
    expected = mla_reference.prefill_mla(latent[-length:], turned[-length:], kv, (length,), 0.2)
    check("mla", out[-length:], expected)


@pytest.mark.parametrize("lengths", RAGGED.values(), ids=RAGGED)
@pytest.mark.parametrize(("heads", "rank", "rope_dim", "block_tokens"), MLA_SHAPES)
def test_decode_mla(heads, rank, rope_dim, lengths, block_tokens, dtype, device, check):
    from kernels.mla import triton as form

    kv = paged(lengths, (rank + rope_dim,), block_tokens, dtype, device)
    q_latent = torch.randn(len(lengths), heads, rank, dtype=dtype, device=device)
    q_rope = torch.randn(len(lengths), heads, rope_dim, dtype=dtype, device=device)
    expected = mla_reference.decode_mla(q_latent, q_rope, kv, 0.2)
    check("o_latent", form.decode_mla(q_latent, q_rope, kv, 0.2), expected)


@pytest.mark.parametrize(
    ("lengths", "rows"), [((1,), (1,)), ((70, 64, 9), (11, 3, 1)), ((34,), (34,))], ids=["one", "chunks", "whole"]
)
@pytest.mark.parametrize(("heads", "rank", "rope_dim", "block_tokens"), MLA_SHAPES)
def test_prefill_mla(heads, rank, rope_dim, lengths, rows, block_tokens, dtype, device, check):
    from kernels.mla import triton as form

    kv = paged(lengths, (rank + rope_dim,), block_tokens, dtype, device)
    q_latent = torch.randn(sum(rows), heads, rank, dtype=dtype, device=device)
    q_rope = torch.randn(sum(rows), heads, rope_dim, dtype=dtype, device=device)
    expected = mla_reference.prefill_mla(q_latent, q_rope, kv, rows, 0.2)
    check("o_latent", form.prefill_mla(q_latent, q_rope, kv, rows, 0.2), expected)


@pytest.mark.parametrize("rows", [(1,), (37, 5, 256), (1, 9, 70)], ids=str)
@pytest.mark.parametrize("block_m", [16, 64, 128])
def test_scratch_of_a_step_is_within_what_a_plan_charges(rows, block_m, device):
    """Block sizes may be any of the tuner's; what is charged is said without them."""
    from kernels.attention import gqa_scratch_bytes
    from kernels.attention.shares import SharePlan
    from kernels.attention.split import SplitPlan
    from kernels.launch import num_sms

    heads, kv_heads, dim = 12, 2, 24
    kv = paged((600,) * len(rows), (2, kv_heads, dim), 64, torch.float32, device)
    chunks = torch.randn(sum(rows), heads, dim, device=device)
    blocks = {"BLOCK_M": block_m, "BLOCK_N": 32, "waves": 128 // block_m}
    plans = (
        SharePlan(chunks, kv, rows, kv_heads, dim, blocks),
        SplitPlan(chunks[: len(rows)], kv, kv_heads, 32, dim, 4),
    )
    taken = sum(tensor.nbytes for plan in plans for tensor in (plan.partial, plan.lse))
    charged = gqa_scratch_bytes(len(rows), sum(rows), heads, kv_heads, dim, num_sms(device))
    assert 0 < taken <= charged


def test_scratch_of_mla_is_charged_by_latents():
    """16 heads of rank 512 on 132 multiprocessors: 8 + 4 x 132 chunks of decode, lanes of all programs and of 256 rows."""
    from kernels.mla import mla_scratch_bytes

    lanes = 128 * 132 + 256 * 16 + 8 * 128
    assert mla_scratch_bytes(8, 256, 16, 512, 132) == 4 * 513 * ((8 + 4 * 132) * 16 + lanes)
