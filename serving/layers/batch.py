"""The layout of one step: which rows belong to which sequence, and where each sequence lies in the KV cache."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from kernels.paged_kv import PagedKV


@dataclass(slots=True)
class BatchLayout:
    """One step of one model: S sequences, T rows in all; the rows of a sequence are adjacent and are its last tokens.

    `run_starts` are the first slots of the sequences' contiguous runs, the same in every layer. `logit_rows` are the rows
    whose next token is wanted. `positions` and `slots` [T] are derived once and serve every layer, as do `turns`, the rows
    of the rotary table that the first layer looks up.
    """

    query_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    run_starts: tuple[int, ...]
    logit_rows: tuple[int, ...]
    positions: torch.Tensor = field(init=False)
    slots: torch.Tensor = field(init=False)
    decode_only: bool = field(init=False)  # every sequence contributes exactly one row
    turns: torch.Tensor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.decode_only = len(self.query_lens) == sum(self.query_lens)
        if self.decode_only:
            positions = [length - 1 for length in self.kv_lens]
            slots = [start + position for start, position in zip(self.run_starts, positions, strict=True)]
        else:
            positions, slots = [], []
            for rows, length, start in zip(self.query_lens, self.kv_lens, self.run_starts, strict=True):
                positions.extend(range(length - rows, length))
                slots.extend(range(start + length - rows, start + length))
        self.positions = torch.tensor(positions)
        self.slots = torch.tensor(slots)

    @property
    def rows(self) -> int:
        return self.positions.shape[0]

    def runs(self, cache: torch.Tensor) -> PagedKV:
        """The sequences' KV in one layer, whose slots are `cache`."""
        return PagedKV(cache, 1, None, None, self.run_starts, self.kv_lens)
