"""Where a lane's hidden rows go for their FFN: into this process, or across the pool boundary."""

from __future__ import annotations

import select
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from serving.shm.mailbox import Mailbox
from serving.workers.config import Bells
from serving.workers.doorbell import answered, ring

_LONGEST_REST_S = 0.001  # new requests come through the control ring, which rings no bell


class FFNPort(Protocol):
    """One exchange a lane at a time: `send`, then `done` until true and as often as one likes, then `result` once."""

    bytes_crossed: int
    crosses: bool  # whether rows leave this process

    def send(self, lane: int, model: int, layer: int, rows: torch.Tensor) -> None: ...

    def done(self, lane: int) -> bool: ...

    def result(self, lane: int) -> torch.Tensor: ...

    def rest(self) -> None:
        """Called when no lane can move: return at once where polling is the way, or sleep until something may have come."""
        ...


class LocalFFN:
    """FFN halves in the same process: `send` computes."""

    bytes_crossed = 0
    crosses = False

    def __init__(self, halves: Mapping[int, object], lanes: int) -> None:
        self._halves = halves
        self._results: list[torch.Tensor | None] = [None] * lanes

    def send(self, lane: int, model: int, layer: int, rows: torch.Tensor) -> None:
        self._results[lane] = self._halves[model].forward(layer, rows)

    def done(self, lane: int) -> bool:
        return True

    def result(self, lane: int) -> torch.Tensor:
        return self._results[lane]

    def rest(self) -> None:
        pass


class RemoteFFN:
    """FFN halves behind a mailbox that both sides poll: lowered control. Counts the bytes that cross, both ways."""

    crosses = True
    bell_fd = -1  # where the arrival of a result is announced; nowhere under lowered control

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

    def rest(self) -> None:
        pass


class RelayedFFN(RemoteFFN):
    """The same mailbox under host-driven control: the relay is told of every send and tells of every result."""

    def __init__(self, mailbox: Mailbox, bells: Bells) -> None:
        super().__init__(mailbox)
        self._to_relay, self._from_relay = bells.attention_to_relay.write_fd, bells.relay_to_attention.read_fd
        self.bell_fd = self._from_relay
        self._answered: set[int] = set()

    def send(self, lane: int, model: int, layer: int, rows: torch.Tensor) -> None:
        super().send(lane, model, layer, rows)
        ring(self._to_relay, lane)

    def done(self, lane: int) -> bool:
        self._answered.update(answered(self._from_relay, timeout_s=0.0))
        return lane in self._answered

    def result(self, lane: int) -> torch.Tensor:
        self._answered.discard(lane)
        return super().result(lane)

    def rest(self) -> None:
        self._answered.update(answered(self._from_relay, timeout_s=_LONGEST_REST_S))


class SpreadFFN:
    """FFN halves of which parts lie behind several mailboxes. A layer's rows go to each of its legs, (mailbox, number), and
    what comes back is added up in float32 in order of the legs."""

    crosses = True

    def __init__(
        self,
        ports: Sequence[RemoteFFN],
        legs: Mapping[int, Sequence[Sequence[tuple[int, int]]]],
        lanes: int,
    ) -> None:
        self._ports, self._legs = ports, legs  # by model, by layer
        self._sent: list[tuple[RemoteFFN, ...]] = [()] * lanes
        self._open: list[list[RemoteFFN]] = [[] for _ in range(lanes)]

    @property
    def bytes_crossed(self) -> int:
        return sum(port.bytes_crossed for port in self._ports)

    def send(self, lane: int, model: int, layer: int, rows: torch.Tensor) -> None:
        legs = self._legs[model][layer]
        self._sent[lane] = tuple(self._ports[port] for port, _ in legs)
        self._open[lane] = list(self._sent[lane])
        for port, number in legs:
            self._ports[port].send(lane, number, layer, rows)

    def done(self, lane: int) -> bool:
        waiting = self._open[lane]
        while waiting and waiting[-1].done(lane):
            waiting.pop()
        return not waiting

    def result(self, lane: int) -> torch.Tensor:
        first, *others = (port.result(lane) for port in self._sent[lane])
        if not others:
            return first
        total = first.to(torch.float32, copy=True)
        for part in others:
            total += part
        return total.to(first.dtype)

    def rest(self) -> None:
        bells = {port.bell_fd for waiting in self._open for port in waiting} - {RemoteFFN.bell_fd}
        if bells:
            select.select(list(bells), [], [], _LONGEST_REST_S)
