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
from serving.cuda.layout import Shape, decode_numbers, idle_numbers, parted, prefill_numbers, smallest
from serving.scheduler import StepPlan


@dataclass(frozen=True)
class GroupPart:
    """Part `number` of a step. `numbers` are what :meth:`serving.cuda.layout.CardLayout.of` reads, by replica; `tokens` says of
    how many sequences each replica gets a new token; row i of the FFN's is that of `sources[i]` ([dp * rows] int64)."""

    number: int
    shape: Shape
    numbers: tuple[torch.Tensor, ...]
    tokens: tuple[int, ...]
    sources: torch.Tensor


class GroupParts:
    """Host memory for the parts of one step at a time, of `replicas` replicas; `pinned` where cards copy from it."""

    def __init__(self, replicas: int, shapes: Seq[Shape], limits: StepLimits, pinned: bool) -> None:
        self._shapes, parts = list(shapes), limits.max_batch + 1
        numbers, rows = max(shape.numbers for shape in shapes), max(shape.rows for shape in shapes)
        self._numbers = torch.zeros(replicas, parts, numbers, dtype=torch.int64, pin_memory=pinned)
        self._sources = torch.zeros(parts, replicas * rows, dtype=torch.int64, pin_memory=pinned)

    def of(self, plans: Seq[StepPlan | None]) -> list[GroupPart]:
        """The step of `plans`, by replica: first all that decode, then the first other sequence of each, the second... What it
        returns holds until the next call."""
        split = [parted(plan) if plan is not None else ([], []) for plan in plans]
        parts: list[GroupPart] = []
        most = max(len(decoding) for decoding, _ in split)
        if most:
            shape = smallest(self._shapes, False, most)
            numbers = self._numbers_of(0, shape)
            for (decoding, _), out in zip(split, numbers, strict=True):
                decode_numbers(decoding, out)
            active = [range(len(decoding)) for decoding, _ in split]
            parts.append(self._part(0, shape, numbers, tuple(map(len, active)), active))
        for chunks in zip_longest(*(others for _, others in split), fillvalue=(None, 0)):
            shape = smallest(self._shapes, True, max(rows for _, rows in chunks))
            numbers = self._numbers_of(len(parts), shape)
            for (sequence, rows), out in zip(chunks, numbers, strict=True):
                prefill_numbers(sequence, rows, out)
            wanted = tuple(int(sequence is not None and rows == sequence.pending) for sequence, rows in chunks)
            active = [range(shape.rows - rows, shape.rows) for _, rows in chunks]
            parts.append(self._part(len(parts), shape, numbers, wanted, active))
        return parts

    def idle(self, shape: Shape) -> GroupPart:
        """A part in which no replica has anything to do."""
        numbers = self._numbers_of(0, shape)
        for out in numbers:
            idle_numbers(shape, out)
        return self._part(0, shape, numbers, (0,) * len(numbers), [range(0)] * len(numbers))

    def _numbers_of(self, number: int, shape: Shape) -> tuple[torch.Tensor, ...]:
        return tuple(replica[number, : shape.numbers] for replica in self._numbers)

    def _part(
        self,
        number: int,
        shape: Shape,
        numbers: tuple[torch.Tensor, ...],
        tokens: tuple[int, ...],
        active: Seq[range],
    ) -> GroupPart:
        """Every active row stands for itself, every idle one is the first active row again."""
        places = [replica * shape.rows + row for replica, rows in enumerate(active) for row in rows]
        sources = self._sources[number, : len(active) * shape.rows]
        sources.fill_(places[0] if places else 0)
        sources[places] = torch.tensor(places, dtype=torch.int64)
        return GroupPart(number, shape, numbers, tokens, sources)
