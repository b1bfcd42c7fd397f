"""Parts hold all of a step, in the order of its sequences, each in the smallest shape that there is."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.batching import StepLimits
from serving.part_shapes import IDLE, Part, Shape, decode_sizes, parts_of, shapes_of, smallest
from serving.scheduler import StepScheduler
from serving.sequence import Sequence

pytestmark = pytest.mark.cpu


def test_shapes_reach_the_limits():
    shapes = shapes_of(StepLimits(max_batch=6, prefill_chunk=100), max_context_tokens=4096)
    assert [shape.decode for shape in shapes if not shape.chunk] == [1, 2, 3, 4, 5, 6]
    assert [shape.chunk for shape in shapes if not shape.decode] == [16, 32, 64, 100]
    assert [shape for shape in shapes if all(shape)] == [(5, 16), (5, 32), (5, 64), (5, 100)]
    assert smallest(shapes, 0, 33) == Shape(0, 64)
    assert smallest(shapes, 2, 33) == Shape(5, 64)
    assert shapes_of(StepLimits(1, 100), 8) == [(1, 0), (0, 8)]
    assert shapes_of(StepLimits(1, 100), 8, replicas=2) == [(1, 0), (0, 8), (1, 8)]


def test_few_decode_rows_have_shapes_of_their_own():
    assert list(decode_sizes(40)) == [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40]
    for most in range(1, 100):
        sizes = list(decode_sizes(most))
        assert sizes == sorted(set(sizes)) and sizes[-1] == most
        assert all(after <= 1.25 * before + 1 for before, after in pairwise(sizes))


@given(
    limits=st.builds(StepLimits, st.integers(1, 9), st.integers(1, 70)),
    waiting=st.lists(st.tuples(st.integers(1, 90), st.booleans()), min_size=1, max_size=12),
)
def test_parts_are_the_step(limits, waiting):
    scheduler, shapes = StepScheduler(1, limits), shapes_of(limits, 200)
    for number, (length, decodes) in enumerate(waiting):
        sequence = Sequence(number, 0, [1] * length, length, 5)
        sequence.cached = length - 1 if decodes else 0
        scheduler.add(sequence)
    plan = scheduler.next_step()
    parts = parts_of(plan)
    assert len(parts) <= limits.max_batch
    items = [
        item
        for part in parts
        for item in [
            *((sequence, 1) for sequence in part.decoding),
            *([(part.prompt, part.rows)] if part.prompt else []),
        ]
    ]
    assert items == list(plan.items)
    assert all(not part.decoding for part in parts[1:])
    wanted = 0
    for part in parts:
        shape = smallest(shapes, len(part.decoding), part.rows)
        assert len(part.active(shape)) == len(part.decoding) + part.rows
        assert shape.rows - 1 in part.active(shape) or not part.rows
        wanted += len(part.wanted(shape))
    assert wanted == len(plan.logit_rows)


def test_nobody_has_anything_to_do_in_an_idle_part():
    assert IDLE == Part() and IDLE.active(Shape(3, 8)) == [] and IDLE.wanted(Shape(3, 8)) == []
