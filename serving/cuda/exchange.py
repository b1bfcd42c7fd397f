"""How rows go from the attention half's stream to the FFN half and back, one way for each control."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch

from kernels.launch import num_sms
from kernels.mailbox import Mailbox, put, wait
from serving.cuda.lane import Lane
from serving.cuda.layers import CardFFNHalf

if TYPE_CHECKING:
    from kernels.resident_ffn import ResidentFFN


class Exchange(Protocol):
    """Called on the attention side's stream, inside a capture too."""

    def __call__(self, layer: int, rows: torch.Tensor) -> torch.Tensor:
        """The FFN of `rows` [T, D] in `layer`, to be read by later work of the stream."""
        ...


class InPlace:
    """Both halves on one stream."""

    def __init__(self, ffn: CardFFNHalf) -> None:
        self._ffn = ffn

    def __call__(self, layer: int, rows: torch.Tensor) -> torch.Tensor:
        return self._ffn.forward(layer, rows)


class ByEvents:
    """The FFN half on its own stream, ordered by events that the host puts between the two: for warming up."""

    def __init__(self, ffn: CardFFNHalf, lane: Lane) -> None:
        self._ffn, self._stream, self._ffn_stream = ffn, lane.stream, lane.ffn_streams[ffn.device]

    def __call__(self, layer: int, rows: torch.Tensor) -> torch.Tensor:
        self._ffn_stream.wait_stream(self._stream)
        with torch.cuda.stream(self._ffn_stream):
            there = rows.to(self._ffn.device, non_blocking=True)
            out = self._ffn.forward(layer, there)
        rows.record_stream(self._ffn_stream)
        self._stream.wait_stream(self._ffn_stream)
        here = out.to(rows.device, non_blocking=True)
        out.record_stream(self._stream)
        return here


class Mailboxes:
    """A mailbox each way between the attention side and one card of FFN halves, a slot a lane."""

    def __init__(
        self,
        lanes: int,
        max_rows: int,
        max_width: int,
        dtype: torch.dtype,
        device: torch.device,
        ffn_device: torch.device,
    ) -> None:
        self.inbound = Mailbox.allocate(lanes, max_rows, max_width, dtype, reader=ffn_device, writer=device)
        self.outbound = Mailbox.allocate(lanes, max_rows, max_width, dtype, reader=device, writer=ffn_device)
        self._compile(device, ffn_device)

    def _compile(self, device: torch.device, ffn_device: torch.device) -> None:
        """One row there and back in one thread: nothing may compile while a capture is under way."""
        for mailbox, writer, reader in ((self.inbound, device, ffn_device), (self.outbound, ffn_device, device)):
            put(mailbox, 0, torch.zeros(1, 16, dtype=mailbox.rows.dtype, device=writer))
            torch.cuda.synchronize(writer)
            wait(mailbox, 0, 1, 16)
            torch.cuda.synchronize(reader)

    def attention_side(self, lane: int) -> Exchange:
        def exchange(layer: int, rows: torch.Tensor) -> torch.Tensor:
            put(self.inbound, lane, rows)
            return wait(self.outbound, lane, *rows.shape)

        return exchange

    def serve_step(self, lane: int, ffn: CardFFNHalf, rows: int) -> None:
        """The FFN side of one whole step of `rows` rows, on its stream."""
        for layer in range(ffn.spec.num_layers):
            received = wait(self.inbound, lane, rows, ffn.spec.hidden_size)
            put(self.outbound, lane, ffn.forward(layer, received))

    def check(self) -> None:
        """Raise RuntimeError if a side gave up waiting."""
        if int(self.inbound.error.item()) or int(self.outbound.error.item()):
            raise RuntimeError("a mailbox wait between the pools gave up")


# Of one card's multiprocessors, where attention shares it: its kernels want nearly all shared memory of one, and would wait
# forever for one that the executor never leaves.
_SHARE_OF_SHARED_CARD = 0.7


class Residents:
    """The resident executors of the weights pool, one a card and dtype, and the number each knows a model by."""

    def __init__(self, ffns: Sequence[CardFFNHalf], lanes: int, max_rows: int, device: torch.device) -> None:
        self._shared_card = device
        from kernels.resident_ffn import ResidentFFN  # Triton, which the other exchanges import on a card only

        self._place: dict[int, tuple[ResidentFFN, int]] = {}
        self.executors: list[ResidentFFN] = []
        held: dict[tuple[torch.device, torch.dtype], list[CardFFNHalf]] = {}
        for ffn in ffns:
            held.setdefault((ffn.device, ffn.dtype), []).append(ffn)
        for (card, dtype), halves in held.items():
            layers = [half.resident_layers for half in halves]
            executor = ResidentFFN(layers, dtype, card, lanes, max_rows, results_device=device)
            self.executors.append(executor)
            self._place |= {id(half): (executor, number) for number, half in enumerate(halves)}
            executor.submit(0, 0, 0, torch.zeros(1, halves[0].spec.hidden_size, dtype=dtype, device=device))
            executor.run_pending()  # compiles the worker and what feeds it
            executor.collect(0, 1, halves[0].spec.hidden_size)
            torch.cuda.synchronize(device)

    def start(self) -> None:
        """Launch the executors, on a share of the multiprocessors where the attention side is on the same card."""
        for executor in self.executors:
            share = _SHARE_OF_SHARED_CARD / len(self.executors) if executor.device == self._shared_card else 1.0
            executor.start(max(1, int(num_sms(executor.device) * share)))

    def attention_side(self, lane: int, ffn: CardFFNHalf) -> Exchange:
        executor, number = self._place[id(ffn)]

        def exchange(layer: int, rows: torch.Tensor) -> torch.Tensor:
            executor.submit(number, layer, lane, rows)
            return executor.collect(lane, *rows.shape)

        return exchange


def bytes_crossed(rows: int, hidden: int, layers: int, element_bytes: int) -> int:
    """Bytes that a step's hidden rows move over the pool boundary, both ways."""
    return 2 * rows * hidden * layers * element_bytes
