"""How attention of prompt chunks is cut into programs on the device, from the lengths alone, and joined again.

A *tile* is `BLOCK_M` (row, head) pairs of one sequence whose heads read the same KV head, so that keys and values are read once
for all of them; a *step* is `BLOCK_N` tokens of its KV. Few rows are few tiles: after a long prefix they would leave most of the
card idle. Then all tiles' steps are laid end to end and every program takes an even *share* of them, which may begin and end
within tiles; a second kernel joins the partial results of tiles that were cut. After a short prefix a program takes one whole
tile, and there is nothing to join. Which of the two is decided on the device, in a grid that fits both, so that one CUDA graph
serves any lengths.

That is the same for every kind of attention. What differs, :func:`attend_shares` is given: how a tile's queries are loaded,
and one step of them over the cache.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl

from kernels.attention.scratch import MOST_LANES, share_slots
from kernels.attention.split import block_channels, look_up, scale_log2
from kernels.launch import launch, next_power_of_2, num_sms
from kernels.paged_kv import PagedKV

FIELDS = tl.constexpr(4)  # of a tile: sequence, the sequence's first row, first pair of it, rows of the sequence
# The least share: what a shorter one reads does not cover writing and joining its result.
SHARE_TOKENS = tl.constexpr(128)
JOIN_TOKENS = tl.constexpr(256)  # by which the longest tile must exceed a share, or joining costs more than it gains

_JOINED_ELEMENTS = 8192  # of partial results in a program's registers at a time
_JOIN_PROGRAMS = 512
_FEWEST_TILES = 128  # that a program looks at: with less, kernels would be compiled for every size of chunk


@triton.jit
def _tile_steps(tiles_ptr, lens_ptr, tile, known, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Steps that `tile` (a number or a vector of them) needs, which is up to what its last row sees; 0 where not `known`."""
    entry = tiles_ptr + tile * FIELDS
    sequence = tl.load(entry, mask=known, other=0)
    first_pair = tl.load(entry + 2, mask=known, other=0)
    query_len = tl.load(entry + 3, mask=known, other=0)
    length = tl.load(lens_ptr + sequence, mask=known, other=0)
    last_row = (tl.minimum(first_pair + BLOCK_M, query_len * GROUP) - 1) // GROUP
    # Rows that fill up a graph's chunk may lie before the first token: they see that one, and nobody reads their result.
    return tl.where(known, tl.cdiv(tl.maximum(length - query_len + last_row + 1, 1), BLOCK_N), 0)


@triton.jit
def _share_steps(steps, num_tiles, readers, programs, BLOCK_N: tl.constexpr):
    """Steps of a share where tiles with `steps` [tiles] are cut among `programs`; 0 where a program takes one whole tile."""
    share = tl.maximum(tl.cdiv(tl.sum(steps) * readers, programs), tl.cdiv(SHARE_TOKENS, BLOCK_N))
    whole = tl.max(steps) * tl.cdiv(num_tiles * readers, programs)
    return tl.where(whole >= share + tl.cdiv(JOIN_TOKENS, BLOCK_N), share, 0)


@triton.jit
def _place_of_tile(steps, index, tile, reader, readers):
    """(first step of the tile's run among all tiles' steps, how many it has). Of a tile, readers come one after the other."""
    count = tl.sum(tl.where(index == tile, steps, 0))
    return tl.sum(tl.where(index < tile, steps, 0)) * readers + reader * count, count


@triton.jit
def _steps_of_program(steps, index, share, program, readers):
    """[first, end) of a program's steps among all tiles' steps; empty where it has none."""
    place, count = _place_of_tile(steps, index, program // readers, program % readers, readers)
    first = tl.where(share > 0, program * share, place)
    return first, tl.where(share > 0, tl.minimum(first + share, tl.sum(steps) * readers), place + count)


@triton.jit
def _find_tile(steps, index, position, end, READERS: tl.constexpr):
    """(tile, reader, its first step, end step, is that the whole tile) of a program that has come to `position` of its
    steps, which last until `end`."""
    tile = tl.sum((tl.cumsum(steps, axis=0) * READERS <= position).to(tl.int32))
    place, count = _place_of_tile(steps, index, tile, 0, READERS)
    reader = (position - place) // count if READERS > 1 else 0  # known to the compiler where there is one
    first = (position - place) % count
    last = tl.minimum(count, first + end - position)
    return tile, reader, first, last, last - first == count


@triton.jit
def _load_tile(tiles_ptr, lens_ptr, tile, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """(sequence; of every lane its row in the queries, its head in the group and whether it exists; the last token that it
    sees; how many tokens all lanes see; end of what any sees)."""
    entry = tiles_ptr + tile * FIELDS
    sequence = tl.load(entry)
    first_row = tl.load(entry + 1)
    first_pair = tl.load(entry + 2)
    query_len = tl.load(entry + 3)
    before = tl.load(lens_ptr + sequence) - query_len  # tokens before the chunk's first row
    pair = first_pair + tl.arange(0, BLOCK_M)
    row = pair // GROUP
    last_row = (tl.minimum(first_pair + BLOCK_M, query_len * GROUP) - 1) // GROUP
    last_seen = tl.maximum(before + row, 0)
    all_see = tl.maximum(before + first_pair // GROUP + 1, 0)
    end = tl.maximum(before + last_row + 1, 1)
    return sequence, first_row + row, pair % GROUP, pair < query_len * GROUP, last_seen, all_see, end


@triton.jit
def _write_tile(
    acc, top, mass, whole, row, exists, slot, out_ptr, partial_ptr, lse_ptr,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Finish [M, D] `acc` over `mass` [M]: to rows `row` [M] of the output where that was the `whole` tile, else to the partial
    results in `slot`, with the base-2 log-sum-exp of each lane (of one that saw no token, minus infinity)."""
    channel = tl.arange(0, BLOCK_D)[None, :]
    result = acc / tl.maximum(mass, 1e-30)[:, None]
    if whole:
        mask = exists[:, None] & (channel < DIM)
        tl.store(out_ptr + row.to(tl.int64)[:, None] * DIM + channel, result.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        place = tl.cast(slot, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        tl.store(partial_ptr + place[:, None] * DIM + channel, result, mask=channel < DIM)
        tl.store(lse_ptr + place, top + tl.log2(mass))


@triton.jit
def _attend_part(
    load_queries: tl.constexpr, attend: tl.constexpr,
    queries_ptr, cache_ptr, table_ptr, lens_ptr, tiles_ptr, out_ptr, partial_ptr, lse_ptr, table_stride, scale,
    tile, reader, first, last, whole, slot,
    MASK_ALL: tl.constexpr, SIZES: tl.constexpr, BLOCK_TOKENS: tl.constexpr, READERS: tl.constexpr, GROUP: tl.constexpr,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Steps `first` to `last` of one tile and reader, into the output or into `slot` of the partial results."""
    sequence, row, member, exists, last_seen, all_see, end = _load_tile(tiles_ptr, lens_ptr, tile, GROUP, BLOCK_M)
    row = row * (READERS * GROUP) + reader * GROUP + member
    queries = load_queries(queries_ptr, row, exists, SIZES, DIM, BLOCK_D)
    table = table_ptr + sequence.to(tl.int64) * table_stride
    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    mass = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    # Steps that every row sees need no mask; those that some see only a part of come last.
    masked = first if MASK_ALL else tl.minimum(tl.maximum(all_see // BLOCK_N, first), last)
    # Blocks are looked up one step ahead: else a step's reads would wait for the table's.
    block = look_up(table, first * BLOCK_N, end, BLOCK_TOKENS, BLOCK_N)
    if not MASK_ALL:
        for start in range(first * BLOCK_N, masked * BLOCK_N, BLOCK_N):
            here = block
            block = look_up(table, start + BLOCK_N, end, BLOCK_TOKENS, BLOCK_N)
            top, mass, acc = attend(
                queries, cache_ptr, reader, here, start, end, last_seen, scale, top, mass, acc,
                False, SIZES, DIM, BLOCK_D, BLOCK_TOKENS, BLOCK_N,
            )  # fmt: skip
    for start in range(masked * BLOCK_N, last * BLOCK_N, BLOCK_N):
        here = block
        block = look_up(table, start + BLOCK_N, end, BLOCK_TOKENS, BLOCK_N)
        top, mass, acc = attend(
            queries, cache_ptr, reader, here, start, end, last_seen, scale, top, mass, acc,
            True, SIZES, DIM, BLOCK_D, BLOCK_TOKENS, BLOCK_N,
        )  # fmt: skip
    _write_tile(acc, top, mass, whole, row, exists, slot, out_ptr, partial_ptr, lse_ptr, DIM, BLOCK_D, BLOCK_M)


@triton.jit
def attend_shares(
    load_queries: tl.constexpr, attend: tl.constexpr,
    queries_ptr, cache_ptr, table_ptr, lens_ptr, tiles_ptr, out_ptr, partial_ptr, lse_ptr,
    num_tiles, programs, table_stride, scale,
    MASK_ALL: tl.constexpr, SIZES: tl.constexpr, MAY_SHARE: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    READERS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """All that one program of a prefill does: its share of all tiles' steps, or one whole tile.

    `load_queries(queries_ptr, row, exists, SIZES, DIM, BLOCK_D)` gives a tile's queries, whose lanes are rows `row` [M] of
    (token, head) pairs. `attend(queries, cache_ptr, reader, block, start, end, last_seen, scale, top, mass, acc, MASKED, SIZES,
    DIM, BLOCK_D, BLOCK_TOKENS, BLOCK_N)` is one step of their online softmax and gives the new (top, mass, acc): tokens `start`..
    below `end` in `block`, lane i seeing those up to `last_seen[i]`, or all of them where it is not `MASKED`. `MASK_ALL` has
    every step masked. `SIZES` is for these two functions alone.
    """
    program = tl.program_id(0)
    if MAY_SHARE:
        index = tl.arange(0, BLOCK_B)
        steps = _tile_steps(tiles_ptr, lens_ptr, index, index < num_tiles, GROUP, BLOCK_M, BLOCK_N)
        share = _share_steps(steps, num_tiles, READERS, programs, BLOCK_N)
        position, stop = _steps_of_program(steps, index, share, program, READERS)
        while position < stop:
            tile, reader, first, last, whole = _find_tile(steps, index, position, stop, READERS)
            _attend_part(
                load_queries, attend,
                queries_ptr, cache_ptr, table_ptr, lens_ptr, tiles_ptr, out_ptr, partial_ptr, lse_ptr, table_stride, scale,
                tile, reader, first, last, whole, tile * READERS + reader + program,
                MASK_ALL, SIZES, BLOCK_TOKENS, READERS, GROUP, DIM, BLOCK_D, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            position += last - first
    else:
        tile = program // READERS
        last = _tile_steps(tiles_ptr, lens_ptr, tile, True, GROUP, BLOCK_M, BLOCK_N)
        _attend_part(
            load_queries, attend,
            queries_ptr, cache_ptr, table_ptr, lens_ptr, tiles_ptr, out_ptr, partial_ptr, lse_ptr, table_stride, scale,
            tile, program % READERS, 0, last, True, 0,
            MASK_ALL, SIZES, BLOCK_TOKENS, READERS, GROUP, DIM, BLOCK_D, BLOCK_M, BLOCK_N,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_tiles"])
def _join_kernel(
    tiles_ptr,
    lens_ptr,
    out_ptr,
    partial_ptr,
    lse_ptr,
    num_tiles,
    programs,
    READERS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Join `LANES` lanes of one tile and reader, where it was cut."""
    tile = tl.program_id(0) // READERS
    reader = tl.program_id(0) % READERS
    index = tl.arange(0, BLOCK_B)
    steps = _tile_steps(tiles_ptr, lens_ptr, index, index < num_tiles, GROUP, BLOCK_M, BLOCK_N)
    share = _share_steps(steps, num_tiles, READERS, programs, BLOCK_N)
    if share > 0:
        place, count = _place_of_tile(steps, index, tile, reader, READERS)
        first_program = place // share
        splits = (place + count - 1) // share - first_program + 1
        if splits > 1:
            lane = tl.program_id(1) * LANES + tl.arange(0, LANES)
            channel = tl.arange(0, BLOCK_D)
            first_slot = tl.program_id(0) + first_program
            top = tl.full((LANES,), -float("inf"), tl.float32)
            mass = tl.zeros((LANES,), tl.float32)
            acc = tl.zeros((LANES, BLOCK_D), tl.float32)
            for start in range(0, splits, BLOCK_S):
                split = start + tl.arange(0, BLOCK_S)
                known = (split < splits)[:, None]
                slot = (first_slot + split).to(tl.int64)[:, None] * BLOCK_M + lane[None, :]  # [S, L]
                lse = tl.load(lse_ptr + slot, mask=known, other=-float("inf"))
                mask = known[:, :, None] & (channel < DIM)[None, None, :]
                part = tl.load(partial_ptr + slot[:, :, None] * DIM + channel[None, None, :], mask=mask, other=0.0)
                new_top = tl.maximum(top, tl.max(lse, axis=0))  # finite: the first split holds a token that all see
                weight = tl.exp2(lse - new_top[None, :])
                fade = tl.exp2(top - new_top)
                mass = mass * fade + tl.sum(weight, axis=0)
                acc = acc * fade[:, None] + tl.sum(part * weight[:, :, None], axis=0)
                top = new_top
            entry = tiles_ptr + tile * FIELDS
            pair = tl.load(entry + 2) + lane
            row = (tl.load(entry + 1) + pair // GROUP) * (READERS * GROUP) + reader * GROUP + pair % GROUP
            mask = (pair < tl.load(entry + 3) * GROUP)[:, None] & (channel < DIM)[None, :]
            out = out_ptr + row.to(tl.int64)[:, None] * DIM + channel[None, :]
            tl.store(out, (acc / mass[:, None]).to(out_ptr.dtype.element_ty), mask=mask)


@functools.lru_cache(maxsize=128)
def query_tiles(query_lens: tuple[int, ...], group: int, pairs_per_tile: int, device: torch.device) -> torch.Tensor:
    """Tiles [N, 4] int32 of a ragged batch, as `FIELDS` has them. Those that see most come first. Kept for the next layers,
    which ask for the same."""
    tiles, first_row = [], 0
    for sequence, rows in enumerate(query_lens):
        tiles += [(sequence, first_row, pair, rows) for pair in range(0, rows * group, pairs_per_tile)]
        first_row += rows
    tiles.sort(key=lambda tile: tile[3] * group - tile[2])
    return torch.tensor(tiles, dtype=torch.int32, device=device).reshape(-1, FIELDS.value)


class SharePlan:
    """Grid and scratch of one prefill, whatever the lengths: at most two partial results a program."""

    def __init__(
        self,
        q: torch.Tensor,
        kv: PagedKV,
        query_lens: tuple[int, ...],
        readers: int,
        dim: int,
        blocks: dict[str, int],
    ) -> None:
        """`readers`: KV heads. `blocks`: BLOCK_M, BLOCK_N, how many `waves` of programs a multiprocessor runs at once, and the
        attending kernel's num_warps and num_stages."""
        assert blocks["BLOCK_M"] * blocks["waves"] <= MOST_LANES, "more scratch than is charged"
        self.kv, self.blocks = kv, blocks
        self.readers, self.group, self.dim = readers, q.shape[1] // readers, dim
        self.block_m, self.block_n = blocks["BLOCK_M"], blocks["BLOCK_N"]
        self.tiles = query_tiles(tuple(query_lens), self.group, self.block_m, q.device)
        self.programs = blocks["waves"] * num_sms(q.device)
        units = len(self.tiles) * readers
        longest = kv.block_table.shape[1] * kv.block_tokens
        slots = share_slots(units, self.programs) if longest > JOIN_TOKENS.value else 0
        self.may_share = slots > 0
        self.grid = (max(units, self.programs) if self.may_share else units,)
        self.partial = torch.empty((slots, self.block_m, dim), dtype=torch.float32, device=q.device)
        self.lse = torch.empty((slots, self.block_m), dtype=torch.float32, device=q.device)

    @property
    def constants(self) -> dict[str, int]:
        """Constexprs that both kernels of the plan take."""
        return {
            "READERS": self.readers,
            "GROUP": self.group,
            "DIM": self.dim,
            "BLOCK_D": block_channels(self.dim),
            "BLOCK_B": max(_FEWEST_TILES, next_power_of_2(len(self.tiles))) if self.may_share else 1,
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
        }

    def attend(self, kernel: Any, queries: tuple[torch.Tensor, ...], scale: float, **sizes: Any) -> torch.Tensor:
        """Run `kernel` with `queries` (the result is like the first), with what :func:`attend_shares` takes, and with `sizes`; then
        join."""
        out = torch.empty_like(queries[0])
        launch(
            kernel,
            self.grid,
            *queries,
            self.kv.cache,
            self.kv.block_table,
            self.kv.kv_lens,
            self.tiles,
            out,
            self.partial,
            self.lse,
            len(self.tiles),
            self.programs,
            self.kv.block_table.stride(0),
            scale_log2(scale),
            **sizes,
            MAY_SHARE=self.may_share,
            BLOCK_TOKENS=self.kv.block_tokens,
            **self.constants,
            num_warps=self.blocks["num_warps"],
            num_stages=self.blocks["num_stages"],
        )
        self.join(out)
        return out

    def join(self, out: torch.Tensor) -> None:
        """Join the partial results into `out`; tiles that were not cut are there already."""
        if not self.may_share:
            return
        constants = self.constants
        units = len(self.tiles) * self.readers
        lanes = self.block_m
        most = _JOINED_ELEMENTS // constants["BLOCK_D"]
        while lanes > 1 and (lanes > most or units * self.block_m // lanes < _JOIN_PROGRAMS):
            lanes //= 2
        launch(
            _join_kernel,
            (units, self.block_m // lanes),
            self.tiles,
            self.kv.kv_lens,
            out,
            self.partial,
            self.lse,
            len(self.tiles),
            self.programs,
            **constants,
            LANES=lanes,
            BLOCK_S=max(1, _JOINED_ELEMENTS // (lanes * constants["BLOCK_D"])),
            num_warps=4,
        )
