"""The parts of one step of a group, made on the host: what every replica computes in shapes that all of them share.

Replicas step together, as data-parallel attention does: a part has the shape that the largest of them needs, and who has fewer
rows, or none, has idle ones.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import zip_longest

import torch

from serving.batching import StepLimits
from serving.cuda.layout import fill_numbers
from serving.part_shapes import IDLE, Part, Shape, parts_of, smallest
from serving.scheduler import StepPlan


@dataclass(frozen=True)
class GroupPart:
    """Part `number` of a step. `numbers` are what :meth:`serving.cuda.layout.CardLayout.of` reads, by replica; `wanted` says which
    sequences of each replica get a new token; row i of the FFN's is that of `sources[i]` ([dp * rows] int64)."""

    number: int
    shape: Shape
    numbers: tuple[torch.Tensor, ...]
    wanted: tuple[list[int], ...]
    sources: torch.Tensor


class GroupParts:
    """Host memory for the parts of one step at a time, of `replicas` replicas; `pinned` where cards copy from it."""

    def __init__(self, replicas: int, shapes: Seq[Shape], limits: StepLimits, pinned: bool) -> None:
        self._replicas, self._shapes = replicas, list(shapes)
        numbers, rows = max(shape.numbers for shape in shapes), max(shape.rows for shape in shapes)
        self._numbers = torch.zeros(replicas, limits.max_batch, numbers, dtype=torch.int64, pin_memory=pinned)
        self._sources = torch.zeros(limits.max_batch, replicas * rows, dtype=torch.int64, pin_memory=pinned)

    def of(self, plans: Seq[StepPlan | None]) -> list[GroupPart]:
        """The step of `plans`, by replica: the first part of each, the second... What it returns holds until the next call."""
        by_replica = [parts_of(plan) if plan is not None else [] for plan in plans]
        made = []
        for number, parts in enumerate(zip_longest(*by_replica, fillvalue=IDLE)):
            decode, chunk = max(len(part.decoding) for part in parts), max(part.rows for part in parts)
            made.append(self._made(number, smallest(self._shapes, decode, chunk), parts))
        return made

    def idle(self, shape: Shape) -> GroupPart:
        """A part in which no replica has anything to do."""
        return self._made(0, shape, [IDLE] * self._replicas)

    def _made(self, number: int, shape: Shape, parts: Seq[Part]) -> GroupPart:
        """Every active row stands for itself, every idle one is the first active row again."""
        numbers = tuple(replica[number, : shape.numbers] for replica in self._numbers)
        for part, out in zip(parts, numbers, strict=True):
            fill_numbers(part, shape, out)
        places = [replica * shape.rows + row for replica, part in enumerate(parts) for row in part.active(shape)]
        sources = self._sources[number, : len(parts) * shape.rows]
        sources.fill_(places[0] if places else 0)
        sources[places] = torch.tensor(places, dtype=torch.int64)
        return GroupPart(number, shape, numbers, tuple(part.wanted(shape) for part in parts), sources)
