"""Captures the graphs of a part's shape: one for both halves, one a side, or one a stage, as the control wants them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from kernels.lm_head import greedy
from kernels.mailbox import put
from serving.cuda.exchange import CutBoundary, Exchange, InPlace, Lowered, Mailboxes
from serving.cuda.ffn_parts import FFNParts
from serving.cuda.lane import Lane
from serving.cuda.layers import CardAttentionHalf, CardFFNHalf
from serving.cuda.layout import BLOCK_TOKENS, CardLayout
from serving.memory.kv_pool import ModelKV
from serving.part_shapes import Shape


@dataclass(frozen=True)
class CardModel:
    """A model as its runner holds it."""

    attention: CardAttentionHalf
    ffn: FFNParts
    kv: ModelKV
    blocks: torch.Tensor  # 0, 1, 2... of one run, on the attention half's card

    @classmethod
    def of(cls, attention: CardAttentionHalf, ffn: FFNParts, kv: ModelKV) -> CardModel:
        count = -(-kv.geometry.max_context_tokens // BLOCK_TOKENS)
        return cls(attention, ffn, kv, torch.arange(count, device=attention.device))

    def forward(self, layout: CardLayout, exchange: Exchange) -> torch.Tensor:
        """The next token of every row wanted, [rows wanted] int64."""
        half = self.attention
        hidden, ffn_out = half.embed(layout.token_ids), None
        for layer in range(half.spec.num_layers):
            hidden, ffn_in = half.attend(layer, hidden, ffn_out, self.kv.layers[layer], layout)
            ffn_out = exchange(layer, ffn_in)
        return greedy(half.logits(hidden, ffn_out, layout))


@dataclass(frozen=True)
class Launches:
    """What a part of one shape is: stages in the order of their launch, each of graphs that may run beside each other, with
    their streams."""

    stages: tuple[tuple[tuple[torch.cuda.CUDAGraph, torch.cuda.Stream], ...], ...]
    kept: tuple[torch.Tensor, ...] = ()  # memory that stages hand on


class Capture:
    """Graphs of one model's parts of one shape in one lane."""

    def __init__(self, lane: Lane, model: CardModel, shape: Shape) -> None:
        self._lane, self._model, self._shape = lane, model, shape
        self._numbers = lane.numbers[: shape.numbers]

    def _layout(self) -> CardLayout:
        return CardLayout.of(self._shape, self._numbers, self._model.blocks)

    def _whole(self, exchange: Exchange) -> tuple[torch.cuda.CUDAGraph, torch.cuda.Stream]:
        def run() -> None:
            self._lane.tokens_of(self._shape).copy_(self._model.forward(self._layout(), exchange))

        return captured(self._lane, self._lane.stream, run), self._lane.stream

    def one(self, exchange: Exchange | None = None) -> Launches:
        """One graph: both halves, or the attention half where `exchange` finds the other without the host."""
        return Launches(((self._whole(exchange or InPlace(self._model.ffn)),),))

    def sides(self, mailboxes: Mapping[torch.device, Mailboxes], slot: int) -> Launches:
        """A graph of the attention side and one of each card with FFN halves, which meet through its `mailboxes`."""
        ffn = self._model.ffn
        sides = [self._whole(Lowered(mailboxes, slot, ffn))]
        for card in ffn.cards:
            stream, boxes = self._lane.ffn_streams[card], mailboxes[card]
            served = captured(self._lane, stream, lambda boxes=boxes: boxes.serve_step(slot, ffn, self._shape.rows))
            sides.append((served, stream))
        return Launches((tuple(sides),))

    def cut_sides(self, boundary: CutBoundary, slot: int) -> Launches:
        """The same for an FFN that is cut by width, which all its cards compute at once."""
        ffn = self._model.ffn
        sides = [self._whole(boundary.attention_side(slot))]
        for place, half in enumerate(ffn.halves):
            stream = self._lane.ffn_streams[half.device]
            served = captured(
                self._lane, stream, lambda place=place: boundary.serve_step(slot, place, ffn, self._shape.rows)
            )
            sides.append((served, stream))
        return Launches((tuple(sides),))

    def layers(self) -> Launches:
        """A graph a layer, both halves in each, and one of the head: for a model whose weights come unit by unit."""
        lane, model = self._lane, self._model
        half = model.attention
        hidden = torch.zeros(self._shape.rows, half.spec.hidden_size, dtype=half.dtype, device=half.device)
        ffn_out = torch.zeros_like(hidden)

        def run(layer: int) -> None:
            layout = self._layout()
            if layer == half.spec.num_layers:
                lane.tokens_of(self._shape).copy_(greedy(half.logits(hidden, ffn_out, layout)))
                return
            before, added = (half.embed(layout.token_ids), None) if layer == 0 else (hidden, ffn_out)
            after, ffn_in = half.attend(layer, before, added, model.kv.layers[layer], layout)
            out = model.ffn.forward(layer, ffn_in)
            hidden.copy_(after)
            ffn_out.copy_(out)

        graphs = [
            captured(lane, lane.stream, lambda layer=layer: run(layer)) for layer in range(half.spec.num_layers + 1)
        ]
        return Launches(tuple(((graph, lane.stream),) for graph in graphs), (hidden, ffn_out))

    def stages(self, mailboxes: Mapping[torch.device, Mailboxes], slot: int) -> Launches:
        """A graph a stage, whose rows cross as they do where no host is needed, but are not waited for."""
        ffn, shape = self._model.ffn, (self._shape.rows, self._model.attention.spec.hidden_size)
        boxes = [mailboxes[ffn.half(layer).device] for layer in range(ffn.spec.num_layers)]

        def ffn_stage(layer: int, half: CardFFNHalf) -> None:
            put(boxes[layer].outbound, slot, half.forward(layer, boxes[layer].inbound.filled(slot, *shape)))

        return self._stages(
            send=lambda layer, rows: put(boxes[layer].inbound, slot, rows),
            result=lambda layer: boxes[layer].outbound.filled(slot, *shape),
            ffn_stage=ffn_stage,
        )

    def cut_stages(self, boundary: CutBoundary, slot: int) -> Launches:
        """The same for an FFN that is cut by width: its cards' graphs of a layer are one stage."""
        ffn, shape = self._model.ffn, (self._shape.rows, self._model.attention.spec.hidden_size)

        def ffn_stage(layer: int, half: CardFFNHalf) -> None:
            place = ffn.halves.index(half)
            boundary.reply(slot, place, half.forward(layer, boundary.received(slot, place, *shape)))

        return self._stages(
            send=lambda _, rows: boundary.put(slot, rows),
            result=lambda _: boundary.answer(slot, *shape),
            ffn_stage=ffn_stage,
        )

    def _stages(
        self,
        send: Callable[[int, torch.Tensor], None],
        result: Callable[[int], torch.Tensor],
        ffn_stage: Callable[[int, CardFFNHalf], None],
    ) -> Launches:
        lane, model = self._lane, self._model
        half, ffn = model.attention, model.ffn
        hidden = torch.zeros(self._shape.rows, half.spec.hidden_size, dtype=half.dtype, device=half.device)

        def attention_stage(layer: int) -> None:
            layout = self._layout()
            before, ffn_out = hidden, None
            if layer == 0:
                before = half.embed(layout.token_ids)
            else:
                ffn_out = result(layer - 1)
            if layer == half.spec.num_layers:
                lane.tokens_of(self._shape).copy_(greedy(half.logits(before, ffn_out, layout)))
                return
            after, ffn_in = half.attend(layer, before, ffn_out, model.kv.layers[layer], layout)
            hidden.copy_(after)
            send(layer, ffn_in)

        stages = []
        for layer in range(half.spec.num_layers):
            attended = captured(lane, lane.stream, lambda layer=layer: attention_stage(layer))
            stages.append(((attended, lane.stream),))
            beside = []
            for held in ffn.halves_of(layer):
                stream = lane.ffn_streams[held.device]
                computed = captured(lane, stream, lambda layer=layer, held=held: ffn_stage(layer, held))
                beside.append((computed, stream))
            stages.append(tuple(beside))
        last = captured(lane, lane.stream, lambda: attention_stage(half.spec.num_layers))
        stages.append(((last, lane.stream),))
        return Launches(tuple(stages), (hidden,))


def captured(lane: Lane, stream: torch.cuda.Stream, run: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """`run` as a graph. Graphs of one stream run one after the other, so they share their memory."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize(stream.device)
    with torch.cuda.device(stream.device), torch.cuda.stream(stream):
        graph.capture_begin(pool=lane.pools[stream], capture_error_mode="thread_local")
        try:
            run()
        finally:
            graph.capture_end()
    return graph
