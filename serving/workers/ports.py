"""Where a lane's hidden rows go for their FFN: into this process, or across the pool boundary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch

from serving.shm.mailbox import Mailbox


class FFNPort(Protocol):
    """One exchange a lane at a time: `send`, then `done` until true, then `result`."""

    bytes_crossed: int

    def send(self, lane: int, model: int, layer: int, rows: torch.Tensor) -> None: ...

    def done(self, lane: int) -> bool: ...

    def result(self, lane: int) -> torch.Tensor: ...


class LocalFFN:
    """FFN halves in the same process: `send` computes."""

    bytes_crossed = 0

    def __init__(self, halves: Mapping[int, object], lanes: int) -> None:
        self._halves = halves
        self._results: list[torch.Tensor | None] = [None] * lanes

    def send(self, lane: int, model: int, layer: int, rows: torch.Tensor) -> None:
        self._results[lane] = self._halves[model].forward(layer, rows)

    def done(self, lane: int) -> bool:
        return True

    def result(self, lane: int) -> torch.Tensor:
        return self._results[lane]


class RemoteFFN:
    """FFN halves behind a mailbox. Counts the bytes of hidden rows that cross, both ways."""

    def __init__(self, mailbox: Mailbox) -> None:
        self._mailbox = mailbox
        self._shapes: list[tuple[int, int, torch.dtype]] = [(0, 0, torch.float32)] * mailbox.shape.slots
        self.bytes_crossed = 0

    def send(self, lane: int, model: int, layer: int, rows: torch.Tensor) -> None:
        count, hidden = rows.shape
        self._shapes[lane] = (count, hidden, rows.dtype)
        self._mailbox.send(lane, model, layer, rows)
        self.bytes_crossed += 2 * count * hidden * rows.element_size()

    def done(self, lane: int) -> bool:
        return self._mailbox.done(lane)

    def result(self, lane: int) -> torch.Tensor:
        return self._mailbox.result(lane, *self._shapes[lane])
