"""Weights that leave when nobody asks for them: when, how often, and never while there is work."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.idle import IdleWeights

pytestmark = pytest.mark.cpu


class Recorded:
    """Weights that come at the second time of asking."""

    def __init__(self):
        self.present, self.asked = True, 0

    def bring(self):
        assert not self.present
        self.asked += 1
        self.present = self.asked % 2 == 0
        return self.present

    def evict(self):
        assert self.present
        self.present = False


@given(st.lists(st.tuples(st.integers(1, 9), st.booleans()), max_size=40))
def test_weights_leave_when_idle_long_enough_and_are_there_when_it_is_said(looks):
    weights = Recorded()
    idle, now_s, idle_since_s = IdleWeights(10.0, weights), 0.0, None
    for passed_s, at_work in looks:
        now_s += passed_s
        before = weights.present
        idle_since_s = None if at_work else now_s if idle_since_s is None else idle_since_s
        assert idle.there(now_s, at_work) == weights.present
        if before and not weights.present:
            assert not at_work and now_s - idle_since_s >= 10
        if not at_work and weights.present:
            assert now_s - idle_since_s < 10
            assert idle.due_s == idle_since_s + 10
        else:
            assert idle.due_s is None
