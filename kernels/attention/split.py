"""How decode attention is cut into programs on the device, from the lengths alone, and how the pieces are joined again.

A fixed number of KV splits leaves the card idle at batch 1 and unbalanced when lengths differ. Here every sequence is cut
into chunks of one size, chosen so that all chunks together fill the card; the grid is the most that any lengths can need
(so a CUDA graph can hold it) and program `work` finds its sequence and chunk by a prefix sum over the batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.attention.scratch import MOST_WAVES, split_slots
from kernels.launch import ceil_div, launch, next_power_of_2, num_sms
from kernels.paged_kv import PagedKV
from kernels.tile import LOG2_E

_FEWEST_SUMMED = 16
_NARROWEST_SLICE = 64
_JOINED_ELEMENTS = 8192  # of partial results in a program's registers at a time

MIN_CHUNK_TOKENS = 256  # below this a chunk's reads no longer cover the cost of joining it


@triton.jit
def chunk_tokens(lengths, readers, programs, BLOCK_N: tl.constexpr, MIN_CHUNK: tl.constexpr):
    """Tokens of one chunk when `readers` programs read each token and about `programs` of them fill the card."""
    chunk = tl.maximum(tl.cdiv(tl.sum(lengths.to(tl.int64)) * readers, programs), MIN_CHUNK)
    return (tl.cdiv(chunk, BLOCK_N) * BLOCK_N).to(tl.int32)


@triton.jit
def find_work(
    lens_ptr,
    batch,
    work,
    readers,
    programs,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MIN_CHUNK: tl.constexpr,
):
    """(sequence, or at least `batch` where there is no such work; its first token; end; is it the only chunk)."""
    index = tl.arange(0, BLOCK_B)
    lengths = tl.load(lens_ptr + index, mask=index < batch, other=0)
    chunk = chunk_tokens(lengths, readers, programs, BLOCK_N, MIN_CHUNK)
    splits = tl.where(index < batch, tl.maximum(tl.cdiv(lengths, chunk), 1), 0)
    sequence = tl.sum((tl.cumsum(splits, axis=0) <= work).to(tl.int32))
    before = tl.sum(tl.where(index < sequence, splits, 0))
    length = tl.sum(tl.where(index == sequence, lengths, 0))
    first = (work - before) * chunk
    return sequence, first, tl.minimum(first + chunk, length), length <= chunk


@triton.jit
def look_up(table_ptr, start, end, BLOCK_TOKENS: tl.constexpr, BLOCK_N: tl.constexpr):
    """What :func:`slots_of` needs of the block table for tokens `start`..: one block where a tile lies within one, else the
    block of every token below `end`."""
    if BLOCK_TOKENS % BLOCK_N == 0:
        block = tl.load(table_ptr + start // BLOCK_TOKENS, mask=start < end, other=0)
    else:
        token = start + tl.arange(0, BLOCK_N)
        block = tl.load(table_ptr + token // BLOCK_TOKENS, mask=token < end, other=0)
    return block


@triton.jit
def slots_of(block, start, BLOCK_TOKENS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Cache slots [BLOCK_N] int64 of tokens `start`.., from what :func:`look_up` gave for them."""
    lane = tl.arange(0, BLOCK_N)
    if BLOCK_TOKENS % BLOCK_N == 0:
        slots = block.to(tl.int64) * BLOCK_TOKENS + start % BLOCK_TOKENS + lane
    else:
        slots = block.to(tl.int64) * BLOCK_TOKENS + (start + lane) % BLOCK_TOKENS
    return slots


@triton.jit
def write_chunk(
    acc,
    top,
    mass,
    whole,
    row,
    work,
    row_in_work,
    rows_of_work,
    mask_row,
    out_ptr,
    partial_ptr,
    lse_ptr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Finish a chunk: [rows, D] `acc` over `mass` [rows] to the output where the chunk is the `whole` sequence, else to
    the partial results of `work` with its base-2 log-sum-exp. `row` is the output's row."""
    channel = tl.arange(0, BLOCK_D)[None, :]
    mask = mask_row[:, None] & (channel < DIM)
    result = acc / tl.maximum(mass, 1e-30)[:, None]
    if whole:
        tl.store(out_ptr + row.to(tl.int64)[:, None] * DIM + channel, result.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        place = (work * rows_of_work + row_in_work).to(tl.int64)
        tl.store(partial_ptr + place[:, None] * DIM + channel, result, mask=mask)
        tl.store(lse_ptr + place, top + tl.log2(mass), mask=mask_row)


@triton.jit
def _combine_kernel(
    lens_ptr,
    out_ptr,
    partial_ptr,
    lse_ptr,
    batch,
    heads,
    readers,
    programs,
    DIM: tl.constexpr,
    SLICE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MIN_CHUNK: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Join `SLICE` channels of one head of one sequence."""
    sequence = tl.program_id(0)
    head = tl.program_id(1)
    index = tl.arange(0, BLOCK_B)
    lengths = tl.load(lens_ptr + index, mask=index < batch, other=0)
    chunk = chunk_tokens(lengths, readers, programs, BLOCK_N, MIN_CHUNK)
    splits = tl.where(index < batch, tl.maximum(tl.cdiv(lengths, chunk), 1), 0)
    before = tl.sum(tl.where(index < sequence, splits, 0))
    count = tl.sum(tl.where(index == sequence, splits, 0))
    if count > 1:
        channel = tl.program_id(2) * SLICE + tl.arange(0, SLICE)
        top = -float("inf")
        mass = 0.0
        acc = tl.zeros((SLICE,), tl.float32)
        for start in range(0, count, BLOCK_S):
            split = start + tl.arange(0, BLOCK_S)
            place = (before + split).to(tl.int64) * heads + head
            lse = tl.load(lse_ptr + place, mask=split < count, other=-float("inf"))
            mask = (split < count)[:, None] & (channel < DIM)[None, :]
            part = tl.load(partial_ptr + place[:, None] * DIM + channel[None, :], mask=mask, other=0.0)
            new_top = tl.maximum(top, tl.max(lse, axis=0))
            weight = tl.exp2(lse - new_top)
            fade = tl.exp2(top - new_top)
            mass = mass * fade + tl.sum(weight, axis=0)
            acc = acc * fade + tl.sum(part * weight[:, None], axis=0)
            top = new_top
        row = sequence.to(tl.int64) * heads + head
        tl.store(out_ptr + row * DIM + channel, (acc / mass).to(out_ptr.dtype.element_ty), mask=channel < DIM)


def block_channels(dim: int) -> int:
    """Channels of a tile that holds `dim`: a power of two, and at least as many as a card's matrix product sums over."""
    return max(_FEWEST_SUMMED, next_power_of_2(dim))


def combine_slice(rows: int, dim: int, sms: int) -> int:
    """Channels of one of `rows` rows of `dim` (a power of two) channels that a program joins. Partial results of a long sequence
    are many and rows of one few: a program a row would read them all through few multiprocessors, one batch after the other."""
    width = dim
    while width > _NARROWEST_SLICE and rows * (dim // width) < sms:
        width //= 2
    return width


class SplitPlan:
    """Grid and scratch of one split decode: at most `work` chunks, whatever the lengths."""

    def __init__(self, q: torch.Tensor, kv: PagedKV, readers: int, block_n: int, dim: int, waves: int) -> None:
        """`readers`: programs that read each token of the cache (KV heads, or blocks of heads in MLA)."""
        assert waves <= MOST_WAVES, "more scratch than is charged"
        batch, self.heads = q.shape[0], q.shape[1]
        self.readers, self.dim, self.block_n = readers, dim, block_n
        self.programs = waves * num_sms(q.device)
        self.min_chunk = max(MIN_CHUNK_TOKENS, block_n)
        self.work = split_slots(batch, self.programs, readers)
        self.may_split = kv.block_table.shape[1] * kv.block_tokens > self.min_chunk
        self.lens, self.batch = kv.kv_lens, batch
        shape = (self.work, self.heads) if self.may_split else (1, 1)
        self.partial = torch.empty((*shape, dim), dtype=torch.float32, device=q.device)
        self.lse = torch.empty(shape, dtype=torch.float32, device=q.device)

    @property
    def constants(self) -> dict[str, int]:
        """Constexprs that every kernel of the plan takes."""
        return {
            "DIM": self.dim,
            "BLOCK_D": block_channels(self.dim),
            "BLOCK_B": next_power_of_2(self.batch),
            "BLOCK_N": self.block_n,
            "MIN_CHUNK": self.min_chunk,
        }

    def combine(self, out: torch.Tensor) -> None:
        """Join the partial results into `out`; sequences of one chunk are there already."""
        if not self.may_split:
            return
        constants = self.constants
        width = combine_slice(self.batch * self.heads, constants.pop("BLOCK_D"), num_sms(out.device))
        launch(
            _combine_kernel,
            (self.batch, self.heads, ceil_div(self.dim, width)),
            self.lens,
            out,
            self.partial,
            self.lse,
            self.batch,
            self.heads,
            self.readers,
            self.programs,
            **constants,
            SLICE=width,
            BLOCK_S=_JOINED_ELEMENTS // width,
            num_warps=4,
        )


def scale_log2(scale: float) -> float:
    """The softmax scale for exponentials of base 2."""
    return scale * LOG2_E.value
