"""Hidden rows over `torch.distributed` point-to-point messages: the pools may lie on different hosts.

A send is two messages, a descriptor of four words and the rows; an answer is one. The far side answers in the order of the
sends, so the near side only ever waits for its oldest lane. It waits in `rest`, when no lane can move: a gloo receive never
says by itself that it is complete, it has to be waited for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
import torch.distributed as dist

_MODEL, _LAYER, _ROWS = range(3)
_WORDS = 4
_STOP = -1


class DistributedFFN:
    """The attention side's port (see :class:`serving.workers.ports.FFNPort`) to the FFNs at rank `peer`. Rows that wait for
    their answer are kept by lane until it comes; `bytes_crossed` counts both ways."""

    crosses = True

    def __init__(self, peer: int, lanes: int) -> None:
        self._peer = peer
        self._sent: list[tuple[torch.Tensor, torch.Tensor, list[dist.Work]] | None] = [None] * lanes
        self._answers: list[torch.Tensor | None] = [None] * lanes
        self._open: deque[tuple[int, dist.Work]] = deque()
        self._done = [False] * lanes
        self.bytes_crossed = 0

    def send(self, lane: int, model: int, layer: int, rows: torch.Tensor) -> None:
        words = torch.tensor([model, layer, rows.shape[0], lane])
        rows = rows.contiguous()
        works = [dist.isend(words, self._peer), dist.isend(rows, self._peer)]
        self._sent[lane] = (words, rows, works)  # alive until the answer is here, by when they have left
        self._answers[lane] = torch.empty_like(rows)
        self._open.append((lane, dist.irecv(self._answers[lane], self._peer)))
        self._done[lane] = False
        self.bytes_crossed += 2 * rows.numel() * rows.element_size()

    def done(self, lane: int) -> bool:
        return self._done[lane]

    def result(self, lane: int) -> torch.Tensor:
        return self._answers[lane]

    def rest(self) -> None:
        """Wait for the oldest lane, which is the next to be answered."""
        if self._open:
            lane, answer = self._open.popleft()
            answer.wait()
            for work in self._sent[lane][2]:
                work.wait()
            self._done[lane] = True

    def close(self) -> None:
        """Tell the far side to stop."""
        dist.send(torch.full((_WORDS,), _STOP), self._peer)


def serve(
    peer: int, shapes: list[tuple[int, torch.dtype]], compute: Callable[[int, int, torch.Tensor], torch.Tensor]
) -> int:
    """The weights side: answer rank `peer` until it stops; `compute(model, layer, rows)` gives the rows that go back, and
    `shapes` has each model's hidden size and dtype. Returns how many stages it computed."""
    words = torch.empty(_WORDS, dtype=torch.int64)
    stages = 0
    while True:
        dist.recv(words, peer)
        model, layer, count = (int(words[i]) for i in (_MODEL, _LAYER, _ROWS))
        if model == _STOP:
            return stages
        hidden, dtype = shapes[model]
        rows = torch.empty(count, hidden, dtype=dtype)
        dist.recv(rows, peer)
        dist.send(compute(model, layer, rows).contiguous(), peer)
        stages += 1
