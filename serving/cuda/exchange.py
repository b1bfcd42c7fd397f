"""How rows go from the attention half's stream to the FFN half and back, one way for each control."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import torch

from kernels.exchange import Inbox, Outbox, collect, exchange, post
from kernels.launch import num_sms
from kernels.mailbox import Mailbox, put, wait
from serving.cuda.ffn_parts import FFNParts
from serving.cuda.lane import Lane

if TYPE_CHECKING:
    from kernels.resident_ffn import ResidentFFN
    from serving.cuda.layers import CardFFNHalf


class Exchange(Protocol):
    """Called on the attention side's stream, inside a capture too."""

    def __call__(self, layer: int, rows: torch.Tensor) -> torch.Tensor:
        """The FFN of `rows` [T, D] in `layer`, to be read by later work of the stream."""
        ...


class InPlace:
    """Both halves on one stream."""

    def __init__(self, ffn: FFNParts) -> None:
        self._ffn = ffn

    def __call__(self, layer: int, rows: torch.Tensor) -> torch.Tensor:
        return self._ffn.forward(layer, rows)


class ByEvents:
    """FFN halves on streams of their own, ordered by events that the host puts between the two: for warming up."""

    def __init__(self, ffn: FFNParts, lane: Lane) -> None:
        self._ffn, self._stream, self._ffn_streams = ffn, lane.stream, lane.ffn_streams

    def __call__(self, layer: int, rows: torch.Tensor) -> torch.Tensor:
        outputs = []
        for half in self._ffn.halves_of(layer):
            ffn_stream = self._ffn_streams[half.device]
            ffn_stream.wait_stream(self._stream)
            with torch.cuda.stream(ffn_stream):
                there = rows.to(half.device, non_blocking=True)
                out = half.forward(layer, there)
            rows.record_stream(ffn_stream)
            self._stream.wait_stream(ffn_stream)
            outputs.append(out.to(rows.device, non_blocking=True))
            out.record_stream(self._stream)
        first, *others = outputs
        for other in others:
            first = first + other
        return first


class Mailboxes:
    """A mailbox each way between the attention side and one card of FFN halves, a slot a lane. Where the host says when a
    stage begins, nothing waits: rows are put and read where they lie."""

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
            with torch.cuda.device(writer):
                put(mailbox, 0, torch.zeros(1, 16, dtype=mailbox.rows.dtype, device=writer))
                torch.cuda.synchronize(writer)
            with torch.cuda.device(reader):
                wait(mailbox, 0, 1, 16)
                torch.cuda.synchronize(reader)

    def ask(self, lane: int, rows: torch.Tensor) -> torch.Tensor:
        """Attention's side of one layer: `rows` [T, D] go, and what the FFN makes of them is waited for, [T, D]."""
        put(self.inbound, lane, rows)
        return wait(self.outbound, lane, *rows.shape)

    def serve_step(self, lane: int, ffn: FFNParts, rows: int) -> None:
        """The FFN side of this card's layers in one step of `rows` rows, on its stream."""
        for layer in ffn.layers_on(self.inbound.rows.device):
            received = wait(self.inbound, lane, rows, ffn.spec.hidden_size)
            put(self.outbound, lane, ffn.forward(layer, received))

    def check(self) -> None:
        """Raise RuntimeError if a side gave up waiting."""
        if int(self.inbound.error.item()) or int(self.outbound.error.item()):
            raise RuntimeError("a mailbox wait between the pools gave up")


class Lowered:
    """Attention's side, which finds the card of each layer through `mailboxes`, by card."""

    def __init__(self, mailboxes: Mapping[torch.device, Mailboxes], lane: int, ffn: FFNParts) -> None:
        self._mailboxes, self._lane, self._ffn = mailboxes, lane, ffn

    def __call__(self, layer: int, rows: torch.Tensor) -> torch.Tensor:
        return self._mailboxes[self._ffn.half(layer).device].ask(self._lane, rows)


class CutBoundary:
    """The boundary to FFNs that are cut by width over cards: the attention side asks all of them at once, and the sum of their
    answers is the FFN's, added up in order of card. Each lane has inboxes of its own."""

    def __init__(
        self,
        lanes: int,
        max_rows: int,
        max_width: int,
        dtype: torch.dtype,
        device: torch.device,
        ffn_devices: Sequence[torch.device],
    ) -> None:
        self._device, self._ffn_devices = device, list(ffn_devices)
        elements, several = max_rows * max_width, range(len(ffn_devices))
        self._asked = [[Inbox.allocate(1, elements, dtype, card) for card in ffn_devices] for _ in range(lanes)]
        self._answered = [Inbox.allocate(len(ffn_devices), elements, dtype, device) for _ in range(lanes)]
        self._ask = [Outbox.into(asked, [0] * len(asked), device) for asked in self._asked]
        self._answer = [
            [Outbox.into([answered], [place], ffn_devices[place]) for place in several] for answered in self._answered
        ]
        self._compile(dtype)

    def _compile(self, dtype: torch.dtype) -> None:
        """A question and its answers in one thread, piece by piece and in the one launch that a step has: nothing may compile
        while a capture is under way."""
        for _ in range(2):
            with torch.cuda.device(self._device):
                self.put(0, torch.zeros(1, 16, dtype=dtype, device=self._device))
                torch.cuda.synchronize(self._device)
            for place, card in enumerate(self._ffn_devices):
                with torch.cuda.device(card):
                    self.reply(0, place, self.received(0, place, 1, 16))
                    torch.cuda.synchronize(card)
            with torch.cuda.device(self._device):
                self.answer(0, 1, 16)
                torch.cuda.synchronize(self._device)
        with torch.cuda.device(self._device):  # nobody answers in this thread, so it gives up, which is then forgotten
            exchange(self._ask[0], self._answered[0], torch.zeros(1, 16, dtype=dtype, device=self._device), True, 0, 0)
            torch.cuda.synchronize(self._device)
        for box in (*self._inboxes, *self._ask, *(one for answers in self._answer for one in answers)):
            box.forget()

    @property
    def _inboxes(self) -> list[Inbox]:
        return [*self._answered, *(inbox for asked in self._asked for inbox in asked)]

    def put(self, lane: int, rows: torch.Tensor) -> None:
        """Attention's rows [T, D] of one layer, to all cards."""
        post(self._ask[lane], rows)

    def answer(self, lane: int, rows: int, width: int) -> torch.Tensor:
        """The FFN of the rows that were put last."""
        return collect(self._answered[lane], rows, width, True)

    def attention_side(self, lane: int) -> Exchange:
        """Both at once: what a step's graph does in each layer."""
        return lambda layer, rows: exchange(self._ask[lane], self._answered[lane], rows, True)

    def received(self, lane: int, place: int, rows: int, width: int) -> torch.Tensor:
        """What card number `place` was asked, once it is there."""
        return collect(self._asked[lane][place], rows, width, False)

    def reply(self, lane: int, place: int, partial: torch.Tensor) -> None:
        post(self._answer[lane][place], partial)

    def serve_step(self, lane: int, place: int, ffn: FFNParts, rows: int) -> None:
        """What card number `place` does in one step of `rows` rows, on its stream."""
        for layer in range(ffn.spec.num_layers):
            received = self.received(lane, place, rows, ffn.spec.hidden_size)
            self.reply(lane, place, ffn.halves[place].forward(layer, received))

    def check(self) -> None:
        """Raise RuntimeError if a side gave up waiting."""
        if any(int(inbox.error.item()) for inbox in self._inboxes):
            raise RuntimeError("a wait between the pools gave up")


# Of a card's multiprocessors: kernels that want nearly all shared memory of one would wait forever for one that the executor
# never leaves. Where attention shares the card those are all of its kernels, elsewhere the FFN's over a prompt.
_SHARE_OF_SHARED_CARD, _SHARE_OF_OWN_CARD = 0.7, 0.85


class Residents:
    """The resident executors of the weights pool, one a card and dtype, and the number each knows a model by."""

    def __init__(self, ffns: Sequence[FFNParts], lanes: int, max_rows: int, device: torch.device) -> None:
        self._attention_card = device
        from kernels.resident_ffn import ResidentFFN  # Triton, which the other exchanges import on a card only

        self._place: dict[int, tuple[ResidentFFN, int]] = {}  # of each half
        self.executors: list[ResidentFFN] = []
        held: dict[tuple[torch.device, torch.dtype], list[CardFFNHalf]] = {}
        for half in (half for ffn in ffns for half in ffn.halves):
            held.setdefault((half.device, half.dtype), []).append(half)
        for (card, dtype), halves in held.items():
            layers = [half.resident_layers for half in halves]
            executor = ResidentFFN(layers, dtype, card, lanes, max_rows, results_device=device)
            self.executors.append(executor)
            self._place |= {id(half): (executor, number) for number, half in enumerate(halves)}
            executor.submit(0, 0, 0, torch.zeros(1, halves[0].spec.hidden_size, dtype=dtype, device=device))
            torch.cuda.synchronize(device)
            with torch.cuda.device(card):
                executor.run_pending()  # compiles the worker and what feeds it
                torch.cuda.synchronize(card)
            executor.collect(0, 1, halves[0].spec.hidden_size)
            torch.cuda.synchronize(device)

    def start(self) -> None:
        """Launch the executors, each on its part of the share of its card that executors may have."""
        cards = [executor.device for executor in self.executors]
        for executor in self.executors:
            share = _SHARE_OF_SHARED_CARD if executor.device == self._attention_card else _SHARE_OF_OWN_CARD
            executor.start(max(1, int(num_sms(executor.device) * share / cards.count(executor.device))))

    def attention_side(self, lane: int, ffn: FFNParts) -> Exchange:
        def exchange(layer: int, rows: torch.Tensor) -> torch.Tensor:
            half = ffn.half(layer)
            executor, number = self._place[id(half)]
            executor.submit(number, half.layers.index(layer), lane, rows)
            return executor.collect(lane, *rows.shape)

        return exchange


def bytes_crossed(rows: int, hidden: int, layers: int, element_bytes: int) -> int:
    """Bytes that a step's hidden rows move over the pool boundary, both ways."""
    return 2 * rows * hidden * layers * element_bytes
