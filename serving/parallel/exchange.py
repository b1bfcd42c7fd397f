"""Rows exchanged between the ranks of a group through shared memory: gathers, and sums in a fixed order.

Every exchange is one step of all ranks: each posts its rows and goes on when all have posted. A rank has two slots and uses
them in turn: it can post its next rows only after everyone posted the last ones, by when everyone has read those before, so
nothing is overwritten that anyone still needs. Sums are float32 in order of rank, so all ranks get the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from serving.shm.region import CACHE_LINE_BYTES, SharedRegion


@dataclass(frozen=True)
class ExchangeShape:
    """`ranks` ranks that post at most `slot_bytes` at once."""

    ranks: int
    slot_bytes: int

    @property
    def padded_bytes(self) -> int:
        return -(-self.slot_bytes // CACHE_LINE_BYTES) * CACHE_LINE_BYTES

    @property
    def region_bytes(self) -> int:
        return self.ranks * (CACHE_LINE_BYTES + 2 * self.padded_bytes)


class Exchange:
    """One rank's end. `post`, then `ready` until true, then `rows` and `total`, which hold until the next-but-one `post`."""

    def __init__(self, region: SharedRegion, shape: ExchangeShape, rank: int) -> None:
        self._rank = rank
        self._posted = [region.words(index * CACHE_LINE_BYTES, 1) for index in range(shape.ranks)]
        data, padded = shape.ranks * CACHE_LINE_BYTES, shape.padded_bytes
        self._slots = [
            [region.bytes[at : at + padded] for at in (data + 2 * index * padded, data + (2 * index + 1) * padded)]
            for index in range(shape.ranks)
        ]
        self._views: dict[tuple[int, int, torch.dtype], torch.Tensor] = {}
        self._count = 0
        self.bytes_posted = 0

    def post(self, rows: torch.Tensor) -> None:
        """Give `rows` [T, ...] to the other ranks."""
        turn = (self._count + 1) % 2
        self._flat(self._rank, turn, rows.dtype)[: rows.numel()].view(rows.shape).copy_(rows)
        self.bytes_posted += rows.numel() * rows.element_size()
        self._count += 1
        self._posted[self._rank][0] = self._count

    def ready(self) -> bool:
        """Whether every rank has posted."""
        count = self._count
        return all(word[0] >= count for word in self._posted)

    def rows(self, rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """What `rank` posted, as `shape`: a view."""
        count = 1
        for size in shape:
            count *= size
        return self._flat(rank, self._count % 2, dtype)[:count].view(shape)

    def total(
        self, ranks: range, shape: tuple[int, int], dtype: torch.dtype, part: slice = slice(None)
    ) -> torch.Tensor:
        """Rows `part` of the sum over `ranks` of what each posted, [len(part), D] in `dtype`."""
        first, *others = ranks
        total = self.rows(first, shape, dtype)[part].to(torch.float32, copy=True)
        for rank in others:
            total += self.rows(rank, shape, dtype)[part]
        return total.to(dtype)

    def _flat(self, rank: int, turn: int, dtype: torch.dtype) -> torch.Tensor:
        key = (rank, turn, dtype)
        view = self._views.get(key)
        if view is None:
            view = self._views[key] = torch.frombuffer(self._slots[rank][turn], dtype=dtype)
        return view
