"""The layout of one step in a card's memory: made from one small array of integers, so that a graph can make it again.

A step is done in parts, each of a shape that a graph exists for: a *decode* part has one row of each of its sequences, and a
*prefill* part has rows of one sequence. Rows that a shape has beyond those wanted are idle: nothing is written for them, and
what they compute is dropped.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import NamedTuple

import torch

from kernels.paged_kv import PagedKV
from serving.batching import StepLimits
from serving.scheduler import StepPlan
from serving.sequence import Sequence

BLOCK_TOKENS = 64  # one look-up of the block table serves a tile of keys
IDLE_SLOT = -1
_FEWEST_PREFILL_ROWS = 16


class Shape(NamedTuple):
    """What a graph is captured for: `rows` sequences of one row each, or (`prefill`) `rows` rows of one sequence."""

    prefill: bool
    rows: int

    @property
    def numbers(self) -> int:
        """Integers that say what a part of this shape computes."""
        return 3 * self.rows + 2 if self.prefill else 5 * self.rows


def _powers_up_to(first: int, most: int) -> list[int]:
    sizes = [min(first, most)]
    while sizes[-1] < most:
        sizes.append(min(2 * sizes[-1], most))
    return sizes


def shapes_of(limits: StepLimits, max_context_tokens: int) -> list[Shape]:
    """Shapes of decode up to the largest batch, and of prefill up to the largest chunk, in powers of two; smaller first."""
    chunk = min(limits.prefill_chunk, max_context_tokens)
    decode = [Shape(False, rows) for rows in _powers_up_to(1, limits.max_batch)]
    return decode + [Shape(True, rows) for rows in _powers_up_to(_FEWEST_PREFILL_ROWS, chunk)]


def smallest(shapes: Seq[Shape], prefill: bool, rows: int) -> Shape:
    """The smallest shape that holds `rows` rows."""
    return next(shape for shape in shapes if shape.prefill == prefill and shape.rows >= rows)


@dataclass(frozen=True)
class CardLayout:
    """One part: T rows of S sequences, whose KV runs are contiguous blocks. `query_lens` is None where every sequence has
    one row (decode), `logit_rows` None where every row's next token is wanted."""

    token_ids: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int64
    slots: torch.Tensor  # [T] int64
    kv_lens: torch.Tensor  # [S] int32
    block_table: torch.Tensor  # [S, blocks] int32
    query_lens: tuple[int, ...] | None = None
    logit_rows: torch.Tensor | None = None

    @classmethod
    def of(cls, shape: Shape, numbers: torch.Tensor, blocks: torch.Tensor) -> CardLayout:
        """Of `numbers` as the functions below fill them; `blocks` is 0, 1, 2... up to a run's blocks."""
        if not shape.prefill:
            token_ids, positions, slots, lens, first = numbers.view(5, shape.rows).unbind(0)
            return cls(token_ids, positions, slots, lens.int(), (first[:, None] + blocks).int())
        rows = shape.rows
        token_ids, positions, slots = numbers[: 3 * rows].view(3, rows).unbind(0)
        lens, first = numbers[3 * rows :].view(2, 1).unbind(0)
        last = blocks[:1] + (rows - 1)
        return cls(
            token_ids, positions, slots, lens.int(), (first[:, None] + blocks).int(), (rows,), last
        )  # fmt: skip

    def paged(self, cache: torch.Tensor) -> PagedKV:
        """The sequences' KV in one layer, whose slots are `cache`."""
        return PagedKV(cache, BLOCK_TOKENS, self.block_table, self.kv_lens)


def parted(plan: StepPlan) -> tuple[list[Sequence], list[tuple[Sequence, int]]]:
    """The sequences of a step that decode, and the others with their rows: a part of all the former, and one each of the latter."""
    decoding = [sequence for sequence, rows in plan.items if rows == 1 == sequence.pending]
    return decoding, [(sequence, rows) for sequence, rows in plan.items if not rows == 1 == sequence.pending]


def decode_numbers(sequences: Seq[Sequence], out: torch.Tensor) -> None:
    """Fill `out` [5 * rows] int64 on the host with the last token of each sequence, and idle rows after them."""
    columns = []
    for sequence in sequences:
        place, start = sequence.cached, sequence.run.start_slot
        columns.append((sequence.tokens[place], place, start + place, place + 1, start // BLOCK_TOKENS))
    idle = len(out) // 5 - len(columns)
    columns.extend([(0, 0, IDLE_SLOT, 0, 0)] * idle)
    out.copy_(torch.tensor(columns).T.reshape(-1))


def idle_numbers(shape: Shape, out: torch.Tensor) -> None:
    """Fill `out` on the host with a part of `shape` in which nobody has anything to do."""
    if shape.prefill:
        prefill_numbers(None, 0, out)
    else:
        decode_numbers([], out)


def prefill_numbers(sequence: Sequence | None, rows: int, out: torch.Tensor) -> None:
    """Fill `out` [3 * T + 2] int64 on the host with the next `rows` tokens of a sequence (None: nothing but idle rows).
    Idle rows come first, so that the last row is always the last token; the kernels take a place before the first as 0."""
    count = (len(out) - 2) // 3
    if sequence is None:
        out.copy_(torch.tensor([0] * (2 * count) + [IDLE_SLOT] * count + [1, 0]))
        return
    start, end = sequence.run.start_slot, sequence.cached + rows
    idle = count - rows
    ids = [0] * idle + sequence.tokens[end - rows : end]
    positions = [max(place, 0) for place in range(end - count, end)]
    slots = [IDLE_SLOT] * idle + list(range(start + end - rows, start + end))
    out.copy_(torch.tensor([*ids, *positions, *slots, end, start // BLOCK_TOKENS]))
