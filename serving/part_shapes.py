"""The parts in which a card runs a step, and the shapes of parts that it has graphs for. Pure.

A graph computes a fixed number of rows, so a step is done in parts, each in the smallest shape that holds it: its decode rows
and the rows of its first prompt go through the model together, each other prompt's rows alone. Rows that a shape has beyond
those wanted are idle: nothing is written for them, and what they compute is dropped.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import NamedTuple

from serving.batching import StepLimits
from serving.scheduler import StepPlan
from serving.sequence import Sequence

_FEWEST_CHUNK_ROWS = 16
_STEPS_AN_OCTAVE = 4


class Shape(NamedTuple):
    """What a graph is captured for: one row each of `decode` sequences, then `chunk` rows of one more prompt (0: of none)."""

    decode: int
    chunk: int

    @property
    def rows(self) -> int:
        return self.decode + self.chunk

    @property
    def sequences(self) -> int:
        return self.decode + (self.chunk > 0)

    @property
    def numbers(self) -> int:
        """Integers that say what a part of this shape computes."""
        return 3 * self.rows + 2 * self.sequences


@dataclass(frozen=True)
class Part:
    """Sequences of which each has one row, and one more of whose prompt the next `rows` tokens are computed."""

    decoding: tuple[Sequence, ...] = ()
    prompt: Sequence | None = None
    rows: int = 0

    def wanted(self, shape: Shape) -> list[int]:
        """Which of the sequences of `shape`, in which it is run, get a new token, in the order of the step's plan."""
        ends = self.prompt is not None and self.rows == self.prompt.pending
        return [*range(len(self.decoding)), *([shape.decode] if ends else [])]

    def active(self, shape: Shape) -> list[int]:
        """Its rows of `shape`; the others are idle."""
        return [*range(len(self.decoding)), *range(shape.rows - self.rows, shape.rows)]


IDLE = Part()


def parts_of(plan: StepPlan) -> list[Part]:
    """The parts of a step, in the order of their sequences in it."""
    decoding = tuple(sequence for sequence, rows in plan.items if rows == 1 == sequence.pending)
    first, *others = [(sequence, rows) for sequence, rows in plan.items if not rows == 1 == sequence.pending] or [
        (None, 0)
    ]
    return [Part(decoding, *first), *(Part((), *other) for other in others)]


def decode_sizes(most: int) -> Iterator[int]:
    """Numbers of decode rows that shapes exist for, up to `most`: every one at first, later four between a number and its
    double. An idle row is as dear as another, since it has experts of its own."""
    size = 1
    while size < most:
        yield size
        size += max(1, (1 << size.bit_length() - 1) // _STEPS_AN_OCTAVE)
    yield most


def chunk_sizes(most: int) -> Iterator[int]:
    """Numbers of a prompt's rows that shapes exist for, up to `most`: powers of two. So many rows have all experts in any case."""
    size = _FEWEST_CHUNK_ROWS
    while size < most:
        yield size
        size *= 2
    yield most


def shapes_of(limits: StepLimits, max_context_tokens: int, replicas: int = 1) -> list[Shape]:
    """Shapes of decode rows, of a chunk, and of a chunk beside as many decode rows as may be, up to the limits; smaller first. Of
    several `replicas` that step together one may decode all the sequences that it can have while another has a chunk."""
    chunks = list(chunk_sizes(min(limits.prefill_chunk, max_context_tokens)))
    alone = [Shape(rows, 0) for rows in decode_sizes(limits.max_batch)] + [Shape(0, rows) for rows in chunks]
    beside = limits.max_batch if replicas > 1 else limits.max_batch - 1
    return alone + [Shape(beside, rows) for rows in chunks if beside]


def smallest(shapes: Seq[Shape], decode: int, chunk: int) -> Shape:
    """The smallest shape that holds so many rows of either kind, and is of the same kinds."""

    def holds(shape: Shape) -> bool:
        same = bool(shape.decode) == bool(decode) and bool(shape.chunk) == bool(chunk)
        return same and shape.decode >= decode and shape.chunk >= chunk

    return next(filter(holds, shapes))
