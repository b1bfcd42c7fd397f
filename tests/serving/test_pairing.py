"""Pairing: complements are found, nothing starves, and a pipeline of them is as fast as its busier side."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.errors import UserError
from serving.pairing import StageProfile, best_partner, overlap

pytestmark = pytest.mark.cpu

SHORT_LONG, LONG_SHORT, EVEN = StageProfile(1, 3), StageProfile(3, 1), StageProfile(2, 2)
stages = st.builds(StageProfile, st.floats(0.1, 10), st.floats(0.1, 10))


def test_complements_overlap_wholly_and_likes_do_not():
    assert overlap(SHORT_LONG, LONG_SHORT) == 1.0
    assert overlap(EVEN, EVEN) == 1.0
    assert overlap(SHORT_LONG, SHORT_LONG) == pytest.approx(2 / 3)
    with pytest.raises(UserError, match="both take time"):
        StageProfile(0, 1)


@given(stages, stages)
def test_overlap_is_a_share_and_the_same_both_ways(one, other):
    assert 0 < overlap(one, other) <= 1 + 1e-12
    assert overlap(one, other) == pytest.approx(overlap(other, one))


def test_the_complement_of_what_is_in_flight_steps_next():
    profiles = [SHORT_LONG, LONG_SHORT, SHORT_LONG, LONG_SHORT]
    assert best_partner([0, 2, 3], {0: 1, 3: 2, 2: 4}, [0], profiles) == 3
    assert best_partner([0, 2, 3], {0: 1, 3: 2, 2: 4}, [1], profiles) == 0
    assert best_partner([0, 2, 3], {0: 1, 2: 2, 3: 4}, [0], profiles) == 0  # the younger half waits for its turn
    assert best_partner([2, 3], {2: 5, 3: 1}, [], profiles) == 3


@given(st.lists(stages, min_size=2, max_size=6), st.integers(1, 3))
def test_no_ready_model_starves(profiles, lanes):
    """All models are always ready; each is served again within a bounded number of steps."""
    count = len(profiles)
    served_at: dict[int, int] = {}
    in_flight: list[int] = []
    for step in range(1, 40 * count):
        model = best_partner(range(count), served_at, in_flight[-(lanes - 1) :] if lanes > 1 else [], profiles)
        served_at[model] = step
        in_flight.append(model)
        if step > 6 * count:
            assert min(served_at.get(m, 0) for m in range(count)) >= step - 6 * count
