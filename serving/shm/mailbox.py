"""Mailboxes for hidden rows between an attention worker and an FFN worker.

One slot a lane. The sender writes rows, fills the descriptor and publishes a sequence number that only grows; the receiver,
which polls, computes and publishes the same number back. A slot holds one exchange at a time, so nothing is overwritten.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from serving.shm.region import CACHE_LINE_BYTES, SharedRegion

_MODEL, _LAYER, _ROWS = 1, 2, 3  # descriptor words beside the sequence number (word 0)


@dataclass(frozen=True)
class MailboxShape:
    """`slots` slots of at most `max_row_bytes` of hidden rows each way."""

    slots: int
    slot_bytes: int

    @property
    def region_bytes(self) -> int:
        return self.slots * (2 * CACHE_LINE_BYTES + 2 * self.padded_bytes)

    @property
    def padded_bytes(self) -> int:
        return -(-self.slot_bytes // CACHE_LINE_BYTES) * CACHE_LINE_BYTES


class _Slot:
    def __init__(self, region: SharedRegion, shape: MailboxShape, index: int) -> None:
        base = index * 2 * CACHE_LINE_BYTES
        self.descriptor = region.words(base, 8)  # written by the sender
        self.done = region.words(base + CACHE_LINE_BYTES, 1)  # written by the receiver
        data = shape.slots * 2 * CACHE_LINE_BYTES + index * 2 * shape.padded_bytes
        self._inbound = region.bytes[data : data + shape.padded_bytes]
        self._outbound = region.bytes[data + shape.padded_bytes : data + 2 * shape.padded_bytes]
        self._views: dict[tuple[int, int, torch.dtype], tuple[torch.Tensor, torch.Tensor]] = {}

    def rows(self, rows: int, hidden: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Tensors [rows, hidden] over the slot: (towards the FFN, back from it). Made once a shape."""
        key = (rows, hidden, dtype)
        views = self._views.get(key)
        if views is None:
            count = rows * hidden
            views = tuple(
                torch.frombuffer(part, dtype=dtype, count=count).view(rows, hidden)
                for part in (self._inbound, self._outbound)
            )
            self._views[key] = views
        return views


class Mailbox:
    """Both ends of the exchange between two workers; each process makes its own over the shared region."""

    def __init__(self, region: SharedRegion, shape: MailboxShape) -> None:
        self.shape = shape
        self._slots = [_Slot(region, shape, index) for index in range(shape.slots)]
        self._seen = [0] * shape.slots

    # -- attention side ------------------------------------------------------------------------------------------------
    def send(self, slot: int, model: int, layer: int, rows: torch.Tensor) -> None:
        """Write `rows` [T, D] into the slot and publish them. The exchange before must be done."""
        box = self._slots[slot]
        count, hidden = rows.shape
        box.rows(count, hidden, rows.dtype)[0].copy_(rows)
        descriptor = box.descriptor
        descriptor[_MODEL], descriptor[_LAYER], descriptor[_ROWS] = model, layer, count
        descriptor[0] += 1

    def done(self, slot: int) -> bool:
        """Whether the rows sent last have come back."""
        box = self._slots[slot]
        return box.done[0] == box.descriptor[0]

    def result(self, slot: int, rows: int, hidden: int, dtype: torch.dtype) -> torch.Tensor:
        """The rows that came back, [rows, hidden]: a view that holds until the next `send` on the slot."""
        return self._slots[slot].rows(rows, hidden, dtype)[1]

    # -- FFN side ------------------------------------------------------------------------------------------------------
    def receive(self, slot: int) -> tuple[int, int, int] | None:
        """(model, layer, rows) of work not yet taken from the slot, or None."""
        descriptor = self._slots[slot].descriptor
        if descriptor[0] == self._seen[slot]:
            return None
        self._seen[slot] = descriptor[0]
        return descriptor[_MODEL], descriptor[_LAYER], descriptor[_ROWS]

    def views(self, slot: int, rows: int, hidden: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows that came and where the result goes, both [rows, hidden]."""
        return self._slots[slot].rows(rows, hidden, dtype)

    def publish(self, slot: int) -> None:
        """Hand the result back."""
        self._slots[slot].done[0] = self._seen[slot]
