"""The memory of a mailbox: rows and flags that two sides share, and each side's own counts."""

from __future__ import annotations

from dataclasses import dataclass

import torch

TIMED_OUT = 1  # error code of a wait that gave up


@dataclass(frozen=True)
class Mailbox:
    """Slots that one side fills and the other empties, in turn. All counts start at 0 and only grow: a slot's `published`
    reaches n when its n-th filling is complete, so a flag is never reset and a late reader is never misled.

    `rows` and `published` belong on the reader's device, where the reader polls; the writer needs access to its memory.
    The writer must not fill a slot again before the reader has taken the last filling: an answer through another slot
    says so.
    """

    rows: torch.Tensor  # [slots, max_rows * max_width]
    published: torch.Tensor  # [slots] int32
    sent: torch.Tensor  # [slots] int32, the writer's own
    taken: torch.Tensor  # [slots] int32, the reader's own
    arrivals: torch.Tensor  # [slots] int64, of the writer's programs
    error: torch.Tensor  # [1] int32, 0 or TIMED_OUT, the reader's

    @classmethod
    def allocate(
        cls,
        num_slots: int,
        max_rows: int,
        max_width: int,
        dtype: torch.dtype,
        reader: torch.device | str,
        writer: torch.device | str | None = None,
    ) -> Mailbox:
        """An empty mailbox of `num_slots` slots of `max_rows` rows of up to `max_width` elements."""
        mine = writer if writer is not None else reader

        def counts(device: torch.device | str, dtype: torch.dtype = torch.int32, n: int = num_slots) -> torch.Tensor:
            return torch.zeros(n, dtype=dtype, device=device)

        rows = torch.zeros(num_slots, max_rows * max_width, dtype=dtype, device=reader)
        arrivals = counts(mine, torch.int64)
        return cls(rows, counts(reader), counts(mine), counts(reader), arrivals, counts(reader, n=1))

    def filled(self, slot: int, num_rows: int, width: int) -> torch.Tensor:
        """A view of the rows [num_rows, width] of a slot."""
        return self.rows[slot, : num_rows * width].view(num_rows, width)
