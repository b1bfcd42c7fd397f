"""The layout of one part of a step in a card's memory: made from one small array of integers, so that a graph can make it again."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch

from kernels.paged_kv import PagedKV
from serving.part_shapes import Part, Shape, parts_of, smallest
from serving.scheduler import StepPlan
from serving.sequence import Sequence

BLOCK_TOKENS = 64  # one look-up of the block table serves a tile of keys
IDLE_SLOT = -1


@dataclass(frozen=True)
class CardLayout:
    """One part of `shape`: T rows of S sequences, whose KV runs are contiguous blocks; decode rows first, one a sequence, then those
    of a chunk. `logit_rows` is None where every row's next token is wanted."""

    shape: Shape
    token_ids: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int64
    slots: torch.Tensor  # [T] int64
    kv_lens: torch.Tensor  # [S] int32
    block_table: torch.Tensor  # [S, blocks] int32
    logit_rows: torch.Tensor | None = None

    @classmethod
    def of(cls, shape: Shape, numbers: torch.Tensor, blocks: torch.Tensor) -> CardLayout:
        """Of `numbers` as :func:`fill_numbers` writes them; `blocks` is 0, 1, 2... up to a run's blocks."""
        rows = shape.rows
        token_ids, positions, slots = numbers[: 3 * rows].view(3, rows).unbind(0)
        lens, first = numbers[3 * rows :].view(2, shape.sequences).unbind(0)
        logit_rows = None
        if shape.chunk:
            every = torch.arange(rows, device=numbers.device)
            logit_rows = torch.cat([every[: shape.decode], every[-1:]])
        return cls(
            shape, token_ids, positions, slots, lens.int(), (first[:, None] + blocks).int(), logit_rows
        )  # fmt: skip

    def decode_kv(self, cache: torch.Tensor) -> PagedKV:
        """The KV in one layer, whose slots are `cache`, of the sequences that decode."""
        decode = self.shape.decode
        return PagedKV(cache, BLOCK_TOKENS, self.block_table[:decode], self.kv_lens[:decode])

    def chunk_kv(self, cache: torch.Tensor) -> PagedKV:
        """The same of the sequence whose prompt the chunk is of."""
        decode = self.shape.decode
        return PagedKV(cache, BLOCK_TOKENS, self.block_table[decode:], self.kv_lens[decode:])


def fill_numbers(part: Part, shape: Shape, out: torch.Tensor) -> None:
    """Fill `out` [shape.numbers] int64 on the host with what `part` computes in `shape`: token, position and slot of every row,
    then KV length and first block of every sequence. Of the decode rows those that are left over come last; of a chunk's they come
    first, so that its last row is always the last token, and the kernels take a place before the first as 0."""
    columns = [_decode_row(sequence) for sequence in part.decoding]
    columns.extend([(0, 0, IDLE_SLOT, 0, 0)] * (shape.decode - len(columns)))
    token_ids, positions, slots, lens, first = (
        map(list, zip(*columns, strict=True)) if columns else ([], [], [], [], [])
    )
    if shape.chunk:
        chunk_ids, chunk_positions, chunk_slots, length, block = _chunk(part, shape.chunk)
        token_ids, positions, slots = token_ids + chunk_ids, positions + chunk_positions, slots + chunk_slots
        lens, first = [*lens, length], [*first, block]
    out.numpy()[:] = [*token_ids, *positions, *slots, *lens, *first]


def fill_parts(plan: StepPlan, shapes: Seq[Shape], out: torch.Tensor) -> Iterator[tuple[int, Shape, list[int]]]:
    """Fill a row of `out` [parts, numbers] int64 for each part of a step, in the smallest of `shapes` that holds it: its number, its
    shape, and which of its sequences get a new token."""
    for number, part in enumerate(parts_of(plan)):
        shape = smallest(shapes, len(part.decoding), part.rows)
        fill_numbers(part, shape, out[number, : shape.numbers])
        yield number, shape, part.wanted(shape)


def _decode_row(sequence: Sequence) -> tuple[int, int, int, int, int]:
    place, start = sequence.cached, sequence.run.start_slot
    return sequence.tokens[place], place, start + place, place + 1, start // BLOCK_TOKENS


def _chunk(part: Part, count: int) -> tuple[list[int], list[int], list[int], int, int]:
    sequence, rows, idle = part.prompt, part.rows, count - part.rows
    if sequence is None:
        return [0] * count, [0] * count, [IDLE_SLOT] * count, 1, 0
    start, end = sequence.run.start_slot, sequence.cached + rows
    token_ids = [0] * idle + sequence.tokens[end - rows : end]
    positions = [max(place, 0) for place in range(end - count, end)]
    slots = [IDLE_SLOT] * idle + list(range(start + end - rows, start + end))
    return token_ids, positions, slots, end, start // BLOCK_TOKENS
