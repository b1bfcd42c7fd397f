"""Runs steps of models on cards, as graphs that were captured at warm-up."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import chain, product
from typing import Protocol

import torch

from kernels.launch import compiling_ahead
from serving.batching import StepLimits
from serving.cuda.capture import Capture, CardModel, Launches
from serving.cuda.exchange import ByEvents, CutBoundary, Mailboxes, Residents, bytes_crossed
from serving.cuda.lane import Lane
from serving.cuda.layout import CardLayout, fill_numbers, fill_parts
from serving.part_shapes import IDLE, Shape, shapes_of
from serving.scheduler import StepPlan


@dataclass(frozen=True)
class _Ready:
    """Part `number` of a step, whose numbers are written: its graphs, and which of its sequences get a new token."""

    number: int
    shape: Shape
    launches: Launches
    wanted: list[int]


@dataclass
class _UnderWay:
    """A step under host control: what is left of it, and the next stage of its first part."""

    parts: list[_Ready] = field(default_factory=list)
    stage: int = 0


class Residency(Protocol):
    """Whose weights are on the card, where models come and go (see :mod:`serving.cuda.residency`)."""

    def present(self, model: int) -> AbstractContextManager[None]:
        """Within it the model's weights are there."""
        ...

    def arriving(self, model: int) -> Seq[torch.cuda.Event] | None:
        """What each layer, and then the head, must wait for; None where all is there."""
        ...


class StepRunner:
    """Steps of `models` in `lanes` lanes. `control` is one of :data:`serving.cuda.config.CONTROLS`; with `residency`, under
    which it is `fused`, a model may step while its weights still come."""

    def __init__(
        self,
        models: Seq[CardModel],
        lanes: int,
        limits: StepLimits,
        control: str,
        residency: Residency | None = None,
    ) -> None:
        self._models, self._control, self._limits = list(models), control, limits
        self._residency = residency
        self.device = models[0].attention.device
        ffn_devices = {card for model in models for card in model.ffn.cards}
        self._shapes = [shapes_of(limits, model.kv.geometry.max_context_tokens) for model in models]
        every = [shape for shapes in self._shapes for shape in shapes]
        self.lanes = [Lane(self.device, ffn_devices, limits.max_batch, every) for _ in range(lanes)]
        self.bytes_crossed = 0
        self._mailboxes: dict[tuple[torch.device, torch.dtype, bool], Mailboxes] = {}
        self._boundaries: dict[tuple[tuple[torch.device, ...], torch.dtype, bool], CutBoundary] = {}
        self._residents: Residents | None = None
        self._launches: dict[tuple[int, int, Shape], Launches] = {}
        self._by_layer: dict[tuple[int, int, Shape], Launches] = {}  # of models that may step while they come
        self._under_way = [_UnderWay() for _ in range(lanes)]
        if control != "fused":
            self._open_mailboxes()
        if control == "resident":
            self._residents = Residents([m.ffn for m in models], lanes, limits.max_batch, self.device)
        self._warm_up()

    def _open_mailboxes(self) -> None:
        """Parts with a chunk and those without have mailboxes of their own: a put has as many programs as its slot has room for."""
        widest = max(model.attention.spec.hidden_size for model in self._models)
        sizes = ((False, self._limits.max_batch), (True, self._limits.max_rows))
        for ffn, (chunk, rows) in product((model.ffn for model in self._models), sizes):
            room = len(self.lanes), rows, widest, ffn.dtype, self.device
            if ffn.cut and (ffn.cards, ffn.dtype, chunk) not in self._boundaries:
                self._boundaries[ffn.cards, ffn.dtype, chunk] = CutBoundary(*room, ffn.cards)
            for ffn_device in () if ffn.cut else ffn.cards:
                if (ffn_device, ffn.dtype, chunk) not in self._mailboxes:
                    self._mailboxes[ffn_device, ffn.dtype, chunk] = Mailboxes(*room, ffn_device)

    # -- steps ---------------------------------------------------------------------------------------------------------
    def launch(self, lane_index: int, model_index: int, plan: StepPlan) -> None:
        """Start a step; what it reads has been mapped. The lane must be free."""
        lane, model = self.lanes[lane_index], self._models[model_index]
        if self._control != "fused":
            spec, dtype = model.attention.spec, model.attention.dtype
            rows = sum(plan.query_lens) * len(model.ffn.halves_of(0))
            self.bytes_crossed += bytes_crossed(rows, spec.hidden_size, spec.num_layers, dtype.itemsize)
        lane.begin()
        parts = list(self._parts(lane_index, model_index, plan))
        if self._control == "host":
            self._under_way[lane_index] = _UnderWay(parts)
            self._next_stage(lane_index)
            return
        arrivals = self._arriving(model_index)
        for part in parts:
            lane.bring_numbers(part.number, part.shape)
            for place, beside in enumerate(part.launches.stages):
                _replay(beside, None if arrivals is None else arrivals[place])
            lane.bring_tokens(part.number, part.shape, part.wanted)
        lane.mark(lane.stream)

    def _arriving(self, model_index: int) -> Seq[torch.cuda.Event] | None:
        return None if self._residency is None else self._residency.arriving(model_index)

    def done(self, lane_index: int) -> bool:
        """Whether the lane's step is done. Under host control this is where its next stage is launched."""
        if not self.lanes[lane_index].done():
            return False
        if not self._under_way[lane_index].parts:
            return True
        self._next_stage(lane_index)
        return False

    def result(self, lane_index: int) -> list[int]:
        """The new tokens of the step that is done, in the order of its plan."""
        return self.lanes[lane_index].result()

    def _parts(self, lane_index: int, model_index: int, plan: StepPlan) -> Iterator[_Ready]:
        lane, shapes = self.lanes[lane_index], self._shapes[model_index]
        launches = self._launches if self._arriving(model_index) is None else self._by_layer
        for number, shape, wanted in fill_parts(plan, shapes, lane.numbers_host):
            yield _Ready(number, shape, launches[lane_index, model_index, shape], wanted)

    def _next_stage(self, lane_index: int) -> None:
        lane, under_way = self.lanes[lane_index], self._under_way[lane_index]
        part = under_way.parts[0]
        beside = part.launches.stages[under_way.stage]
        if under_way.stage == 0:
            lane.bring_numbers(part.number, part.shape)
        _replay(beside)
        under_way.stage += 1
        if under_way.stage == len(part.launches.stages):
            lane.bring_tokens(part.number, part.shape, part.wanted)
            under_way.parts.pop(0)
            under_way.stage = 0
        lane.mark(*(stream for _, stream in beside))

    # -- warm-up -------------------------------------------------------------------------------------------------------
    def _warm_up(self) -> None:
        """Compile what steps launch, several kernels at a time, run each once, then capture every shape in every lane and launch
        it once: of all models together where their weights are there to stay, else of one after the other."""
        if self._residency is None:
            self._prepare(range(len(self._models)))
            if self._residents is not None:
                self._residents.start()
            self._launch_once(range(len(self._models)))
        else:
            for model_index in range(len(self._models)):
                with self._residency.present(model_index):
                    self._prepare([model_index])
                    self._launch_once([model_index])

    def _prepare(self, models: Seq[int]) -> None:
        with compiling_ahead():
            self._run_every_shape(self.lanes[:1], models)
        self._run_every_shape(self.lanes, models)
        for lane_index, model_index in product(range(len(self.lanes)), models):
            for shape in reversed(self._shapes[model_index]):
                key = lane_index, model_index, shape
                self._launches[key] = self._capture(*key)
                if self._residency is not None:
                    self._by_layer[key] = Capture(self.lanes[lane_index], self._models[model_index], shape).layers()
        torch.cuda.synchronize(self.device)

    def _launch_once(self, models: Seq[int]) -> None:
        """Every graph of `models`, all rows idle: the driver brings a graph to the card when it is launched for the first time, for
        which no request should wait. Only streams are waited for: a resident executor never ends."""
        for (lane_index, model_index, shape), launches in chain(self._launches.items(), self._by_layer.items()):
            if model_index not in models:
                continue
            lane = self.lanes[lane_index]
            fill_numbers(IDLE, shape, lane.numbers_host[0, : shape.numbers])
            lane.bring_numbers(0, shape)
            for beside in launches.stages:
                _replay(beside)
                for _, stream in beside:
                    stream.synchronize()

    def _run_every_shape(self, lanes: Seq[Lane], models: Seq[int]) -> None:
        """Each model's parts of each shape, all rows idle, kernel by kernel."""
        for lane in lanes:
            for model, shapes in ((self._models[index], self._shapes[index]) for index in models):
                for shape in shapes:
                    self._idle_numbers(lane, shape)
                    with torch.cuda.stream(lane.stream):
                        layout = CardLayout.of(shape, lane.numbers[: shape.numbers], model.blocks)
                        model.forward(layout, ByEvents(model.ffn, lane))
                torch.cuda.synchronize(self.device)

    def _idle_numbers(self, lane: Lane, shape: Shape) -> None:
        host = lane.numbers_host[0, : shape.numbers]
        fill_numbers(IDLE, shape, host)
        torch.cuda.synchronize(self.device)
        lane.numbers[: shape.numbers].copy_(host)

    def _capture(self, lane_index: int, model_index: int, shape: Shape) -> Launches:
        lane, model = self.lanes[lane_index], self._models[model_index]
        self._idle_numbers(lane, shape)
        capture = Capture(lane, model, shape)
        if self._control == "fused":
            return capture.one()
        if self._residents is not None and not shape.chunk:
            return capture.one(self._residents.attention_side(lane_index, model.ffn))
        if model.ffn.cut:
            boundary = self._boundaries[model.ffn.cards, model.ffn.dtype, shape.chunk > 0]
            return (capture.cut_stages if self._control == "host" else capture.cut_sides)(boundary, lane_index)
        mailboxes = {card: self._mailboxes[card, model.ffn.dtype, shape.chunk > 0] for card in model.ffn.cards}
        return (capture.stages if self._control == "host" else capture.sides)(mailboxes, lane_index)

    def close(self) -> None:
        """Wait for everything and let executors end. Raises RuntimeError if one of them, or a mailbox wait, gave up."""
        for lane in self.lanes:
            lane.stream.synchronize()
        for executor in self._residents.executors if self._residents else ():
            executor.stop()
        for boundary in (*self._mailboxes.values(), *self._boundaries.values()):
            boundary.check()


def _replay(beside: Seq[tuple[torch.cuda.CUDAGraph, torch.cuda.Stream]], after: torch.cuda.Event | None = None) -> None:
    """Launch the graphs of one stage, each on its stream and `after` that event, if there is one."""
    for graph, stream in beside:
        with torch.cuda.stream(stream):
            if after is not None:
                stream.wait_event(after)
            graph.replay()
