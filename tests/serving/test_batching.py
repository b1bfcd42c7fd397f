"""Batching policies: limits hold, decode rows come first, nobody starves."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.batching import StepLimits, compose_step, least_recently_served
from serving.errors import UserError

pytestmark = pytest.mark.cpu


@given(st.lists(st.integers(1, 50), max_size=20), st.integers(1, 9), st.integers(1, 40))
def test_a_step_respects_its_limits_and_makes_progress(pending, max_batch, prefill_chunk):
    limits = StepLimits(max_batch, prefill_chunk)
    step = compose_step(pending, limits)
    assert len(step) <= max_batch
    assert sum(rows for _, rows in step) <= limits.max_rows
    assert sum(rows for index, rows in step if pending[index] > 1) <= prefill_chunk
    assert len({index for index, _ in step}) == len(step)
    assert all(1 <= rows <= pending[index] for index, rows in step)
    assert bool(step) == bool(pending)


def test_decode_rows_come_first_then_prompts_in_order_of_arrival():
    assert compose_step([200, 1, 70, 1], StepLimits(8, 128)) == [(1, 1), (3, 1), (0, 128)]
    assert compose_step([100, 1, 70], StepLimits(8, 128)) == [(1, 1), (0, 100), (2, 28)]
    assert compose_step([1, 1, 1, 9], StepLimits(2, 128)) == [(0, 1), (1, 1)]


def test_every_ready_model_is_served_once_a_round():
    served_at, order = {}, []
    for step in range(9):
        model = least_recently_served([0, 1, 2], served_at)
        served_at[model] = step
        order.append(model)
    assert order == [0, 1, 2] * 3


def test_limits_must_allow_a_row():
    with pytest.raises(UserError, match="at least 1"):
        StepLimits(0, 128)
