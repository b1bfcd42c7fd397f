"""The two sides of a part of a step, each alone: a graph of the attention side and one of the FFN side, nothing crossing."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from collections.abc import Sequence as Seq

import torch

from serving.cuda.capture import Capture, CardModel, captured
from serving.cuda.lane import Lane
from serving.part_shapes import Shape

_ROUNDS = 20


class Sides:
    """Graphs of both sides of `shape`, each with its stream: `attention`, embedding and head included, of what
    :meth:`set_numbers` said last, and `ffn`, of random rows. The kernels of both must have run before; all FFN halves are on one
    card."""

    def __init__(self, model: CardModel, shape: Shape) -> None:
        half, ffn = model.attention, model.ffn
        (ffn_card,) = ffn.cards
        self._lane = lane = Lane(half.device, set(ffn.cards), 1, [shape])
        self._shape = shape
        self.set_numbers(lambda out: out.zero_())
        ((self.attention,),) = Capture(lane, model, shape).one(lambda layer, rows: rows).stages
        self._rows = torch.randn(shape.rows, half.spec.hidden_size, device=ffn_card, dtype=ffn.dtype)
        stream = lane.ffn_streams[ffn_card]

        def served(layers: Seq[int]) -> tuple[torch.cuda.CUDAGraph, torch.cuda.Stream]:
            return captured(lane, stream, lambda: [ffn.forward(layer, self._rows) for layer in layers]), stream

        self.ffn = served(ffn.layers_on(ffn_card))
        self._dense = served(ffn.spec.dense_layers) if ffn.spec.dense_layers else None

    def attention_s(self, numbers: Callable[[torch.Tensor], None]) -> float:
        """Median seconds of the attention side, embedding and head included, of what `numbers` writes into its argument."""
        self.set_numbers(numbers)
        return replayed_s(*self.attention)

    def ffn_s(self) -> float:
        """Median seconds of the FFN side, of random rows."""
        return replayed_s(*self.ffn)

    def dense_s(self) -> float:
        """Of that the layers without experts."""
        return replayed_s(*self._dense) if self._dense else 0.0

    def set_numbers(self, numbers: Callable[[torch.Tensor], None]) -> None:
        """Have the attention side compute what `numbers` writes into its argument."""
        host = self._lane.numbers_host[0, : self._shape.numbers]
        numbers(host)
        self._lane.numbers[: self._shape.numbers].copy_(host)
        torch.cuda.synchronize(self._lane.device)


def replayed_s(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream) -> float:
    """Median seconds of `graph` on `stream`, with nothing else there."""
    with torch.cuda.stream(stream):
        times = []
        for _ in range(_ROUNDS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record(stream)
            graph.replay()
            end.record(stream)
            stream.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)
