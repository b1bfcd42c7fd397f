"""The layout of one step in a card's memory: made from one small array of integers, so that a graph can make it again."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.paged_kv import PagedKV
from serving.scheduler import StepPlan

BLOCK_TOKENS = 64  # one look-up of the block table serves a tile of keys
ROW_FIELDS, SEQUENCE_FIELDS = 3, 2  # token id, position, slot; length, first block
IDLE_SLOT = -1  # of a row that fills up a bucket: nothing is written for it


@dataclass(frozen=True)
class CardLayout:
    """One step: T rows of S sequences, whose KV runs are contiguous blocks. `query_lens` is None where every sequence has
    one row (decode), `logit_rows` None where every row's next token is wanted."""

    token_ids: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int64
    slots: torch.Tensor  # [T] int64
    kv_lens: torch.Tensor  # [S] int32
    block_table: torch.Tensor  # [S, blocks] int32
    query_lens: tuple[int, ...] | None = None
    logit_rows: torch.Tensor | None = None

    @classmethod
    def decode(cls, numbers: torch.Tensor, blocks: torch.Tensor) -> CardLayout:
        """Of `numbers` [5, S] int64 as :func:`decode_numbers` gives them; `blocks` is 0, 1, 2... up to a run's blocks."""
        token_ids, positions, slots, lens, first = numbers.unbind(0)
        return cls(token_ids, positions, slots, lens.int(), (first[:, None] + blocks).int())

    @classmethod
    def ragged(cls, plan: StepPlan, blocks: torch.Tensor) -> CardLayout:
        """Of any step. A step that wants no token, in the midst of a prompt, is given that of its last row."""
        device = blocks.device
        positions, slots = [], []
        for (sequence, rows), length in zip(plan.items, plan.kv_lens, strict=True):
            start = sequence.run.start_slot
            positions.extend(range(length - rows, length))
            slots.extend(range(start + length - rows, start + length))
        first = [sequence.run.start_slot // BLOCK_TOKENS for sequence, _ in plan.items]
        rows_of = torch.tensor([plan.token_ids, positions, slots], device=device)
        of_sequences = torch.tensor([plan.kv_lens, first], device=device)
        return cls(
            *rows_of.unbind(0),
            of_sequences[0].int(),
            (of_sequences[1][:, None] + blocks).int(),
            None if max(plan.query_lens) == 1 else plan.query_lens,
            torch.tensor(plan.logit_rows or (len(slots) - 1,), device=device),
        )

    def paged(self, cache: torch.Tensor) -> PagedKV:
        """The sequences' KV in one layer, whose slots are `cache`."""
        return PagedKV(cache, BLOCK_TOKENS, self.block_table, self.kv_lens)


def decode_numbers(plan: StepPlan, out: torch.Tensor) -> None:
    """Fill `out` [5, bucket] int64 on the host with a decode step's rows, idle ones after them."""
    columns = []
    for (sequence, _), length in zip(plan.items, plan.kv_lens, strict=True):
        start = sequence.run.start_slot
        columns.append((sequence.tokens[length - 1], length - 1, start + length - 1, length, start // BLOCK_TOKENS))
    idle = out.shape[1] - len(columns)
    columns.extend([(0, 0, IDLE_SLOT, 0, 0)] * idle)
    out.copy_(torch.tensor(columns).T)
