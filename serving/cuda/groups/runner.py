"""Runs steps of one group: on every rank's card a graph of the same shape, which meet in their exchanges."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch

from kernels.launch import compiling_ahead
from serving.batching import StepLimits
from serving.cuda.capture import captured
from serving.cuda.groups.parts import GroupPart, GroupParts
from serving.cuda.groups.rank import CardRank, Rows
from serving.cuda.groups.rows import AloneRows, ExchangedRows, exchanged_rows
from serving.cuda.lane import Lane
from serving.cuda.layout import CardLayout
from serving.parallel.group import GroupPlan
from serving.part_shapes import Shape, shapes_of
from serving.scheduler import StepPlan


class GroupRunner:
    """Steps of the group `plan`, one at a time; `ranks` hold its shares."""

    def __init__(self, plan: GroupPlan, ranks: Seq[CardRank], limits: StepLimits) -> None:
        self._plan, self._ranks, self._limits = plan, list(ranks), limits
        half = ranks[0].attention
        self._width, self._row_bytes = half.spec.hidden_size, half.spec.hidden_size * half.dtype.itemsize
        self._shapes = shapes_of(limits, ranks[0].kv.geometry.max_context_tokens, plan.dp)
        self._parts = GroupParts(plan.dp, self._shapes, limits, pinned=True)
        self._lanes = [Lane(rank.device, set(), limits.max_batch, self._shapes) for rank in ranks]
        most = plan.dp * max(shape.rows for shape in self._shapes)
        self._sources = [torch.zeros(most, dtype=torch.int64, device=rank.device) for rank in ranks]
        cards = [rank.device for rank in ranks]
        self._rows: dict[
            bool, list[ExchangedRows]
        ] = {  # of parts with a chunk and without one, whose slots differ in size
            chunk: exchanged_rows(plan, cards, rows, self._width, half.dtype)
            for chunk, rows in ((False, limits.max_batch), (True, limits.max_rows))
        }
        self._graphs: dict[tuple[int, Shape], torch.cuda.CUDAGraph] = {}
        self.bytes_crossed = 0
        self._warm_up()

    # -- steps ---------------------------------------------------------------------------------------------------------
    def launch(self, plans: Seq[StepPlan | None]) -> None:
        """Start a step of `plans`, by replica; what they read has been mapped."""
        for lane in self._lanes:
            lane.begin()
        for part in self._parts.of(plans):
            for rank, lane in enumerate(self._lanes):
                with torch.cuda.stream(lane.stream):
                    self._copy_in(rank, part)
                    self._graphs[rank, part.shape].replay()
                    self._bring_tokens(rank, part)
            self.bytes_crossed += self._posted_bytes(part.shape.rows)
        for lane in self._lanes:
            lane.mark(lane.stream)

    def done(self) -> bool:
        return all(lane.done() for lane in self._lanes)

    def result(self) -> list[list[int]]:
        """The new tokens of the step that is done, by replica in the order of its plan."""
        return [self._lanes[self._plan.ranks_of(replica)[0]].result() for replica in range(self._plan.dp)]

    def _copy_in(self, rank: int, part: GroupPart) -> None:
        shape = part.shape
        numbers = part.numbers[self._plan.replica_of(rank)]
        self._lanes[rank].numbers[: shape.numbers].copy_(numbers, non_blocking=True)
        if self._plan.dp > 1:
            self._sources[rank][: len(part.sources)].copy_(part.sources, non_blocking=True)

    def _bring_tokens(self, rank: int, part: GroupPart) -> None:
        """From the first rank of each replica; the others have the same."""
        replica, lane = self._plan.replica_of(rank), self._lanes[rank]
        if rank == self._plan.ranks_of(replica)[0]:
            lane.bring_tokens(part.number, part.shape, part.wanted[replica])

    def _posted_bytes(self, rows: int) -> int:
        """Bytes that all ranks post to others in a part of `rows` rows a replica."""
        others = (self._plan.tp - 1) + (self._plan.dp - 1) + (self._plan.ranks - 1)
        layers = self._ranks[0].attention.spec.num_layers
        return self._plan.ranks * others * rows * self._row_bytes * layers

    # -- warm-up -------------------------------------------------------------------------------------------------------
    def _warm_up(self) -> None:
        """On each card compile what steps launch, several kernels at a time, and run it once; then capture every shape and
        launch it once."""
        alone = AloneRows(self._plan)
        for rank, held in enumerate(self._ranks):
            with torch.cuda.device(held.device):
                with compiling_ahead():
                    self._run_every_shape(rank, alone)
                self._run_every_shape(rank, alone)
        for by_rank in self._rows.values():
            for held, rows in zip(self._ranks, by_rank, strict=True):
                rows.compile(held.device, self._width, self._plan.dp)
            for rows in by_rank:
                rows.forget()
        for rank, lane in enumerate(self._lanes):
            for shape in reversed(self._shapes):
                self._idle(rank, shape)
                rows = self._rows[shape.chunk > 0][rank]
                self._graphs[rank, shape] = captured(
                    lane, lane.stream, lambda rank=rank, shape=shape, rows=rows: self._step(rank, shape, rows)
                )
            torch.cuda.synchronize(lane.device)
        self._launch_every_shape()

    def _launch_every_shape(self) -> None:
        """Each graph once, on all cards: the driver brings it there when it is launched for the first time, for which no request
        should wait."""
        for shape in self._shapes:
            for rank in range(len(self._ranks)):
                self._idle(rank, shape)
            for rank, lane in enumerate(self._lanes):
                with torch.cuda.stream(lane.stream):
                    self._graphs[rank, shape].replay()
            for lane in self._lanes:
                lane.stream.synchronize()

    def _run_every_shape(self, rank: int, rows: Rows) -> None:
        for shape in self._shapes:
            self._idle(rank, shape)
            with torch.cuda.stream(self._lanes[rank].stream):
                self._step(rank, shape, rows)
            torch.cuda.synchronize(self._lanes[rank].device)

    def _idle(self, rank: int, shape: Shape) -> None:
        torch.cuda.synchronize(self._lanes[rank].device)
        self._copy_in(rank, self._parts.idle(shape))
        torch.cuda.synchronize(self._lanes[rank].device)

    def _step(self, rank: int, shape: Shape, rows: Rows) -> None:
        lane, held = self._lanes[rank], self._ranks[rank]
        layout = CardLayout.of(shape, lane.numbers[: shape.numbers], held.blocks)
        sources = self._sources[rank][: self._plan.dp * shape.rows] if self._plan.dp > 1 else None
        lane.tokens_of(shape).copy_(held.forward(layout, sources, rows))

    def close(self) -> None:
        """Wait for everything. Raises RuntimeError where a rank gave up waiting for another."""
        for lane in self._lanes:
            lane.stream.synchronize()
        for by_rank in self._rows.values():
            for rows in by_rank:
                rows.check()
