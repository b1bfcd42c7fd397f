"""Growth without an arbiter: pages are conserved, the oldest go first, and only the youngest lose what they hold."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.growth import Claim, grow_or_preempt

pytestmark = pytest.mark.cpu

claims_lists = st.lists(st.builds(lambda held, more: Claim(held, held + more), st.integers(0, 9), st.integers(0, 5)))


@given(st.integers(0, 40), claims_lists)
def test_pages_are_conserved_and_each_claim_has_one_answer(free, claims):
    granted, preempted = grow_or_preempt(free, claims)
    assert not set(granted) & set(preempted)
    assert all(claims[index].held for index in preempted)
    left = free + sum(claims[i].held for i in preempted) - sum(claims[i].needed - claims[i].held for i in granted)
    assert left >= 0
    running = [index for index, claim in enumerate(claims) if claim.held]
    assert set(running) <= set(granted) | set(preempted)
    if running and claims[running[0]].needed <= free + sum(claims[i].held for i in running):
        assert running[0] in granted, "the oldest is served where it fits at all"


@given(st.integers(0, 40), claims_lists)
def test_nobody_is_preempted_while_there_are_pages(free, claims):
    wanted = sum(max(claim.needed - claim.held, 0) for claim in claims)
    if wanted <= free:
        assert grow_or_preempt(free, claims) == (list(range(len(claims))), [])


def test_the_youngest_gives_way_and_waits_behind_nobody_who_runs():
    assert grow_or_preempt(0, [Claim(2, 3), Claim(0, 3), Claim(3, 3)]) == ([0], [2])
    assert grow_or_preempt(1, [Claim(2, 3), Claim(0, 5), Claim(0, 0)]) == ([0], [])
    assert grow_or_preempt(0, [Claim(2, 3)]) == ([], [0])
