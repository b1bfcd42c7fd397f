"""Growth that pauses: whatever comes, everyone finishes, nobody is preempted and no page is lent twice."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.pausing import Claim, may_take

pytestmark = pytest.mark.cpu


def test_a_grant_that_could_end_in_a_deadlock_is_withheld():
    # 10 pages, 2 free: two sequences hold 4 each and may need 7. Giving one page to each strands both.
    assert may_take(2, [Claim(4, 5, 7), Claim(4, 5, 7)]) == [False, False]
    assert may_take(3, [Claim(4, 5, 7), Claim(3, 4, 7)]) == [True, False]
    assert may_take(2, [Claim(4, 4, 7), Claim(4, 4, 6)]) == [True, True]


def test_a_newcomer_waits_behind_an_older_one_that_pauses():
    assert may_take(2, [Claim(4, 8, 8), Claim(0, 1, 1)]) == [False, False]
    assert may_take(3, [Claim(4, 8, 8), Claim(1, 2, 2)]) == [False, True]


requests = st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6), st.integers(0, 8)), min_size=1, max_size=12)


@given(st.integers(12, 20), requests, st.randoms(use_true_random=False))
def test_everyone_finishes_and_the_budget_holds(budget, asked, random):
    """Each request (first pages, pages it grows by, when it comes) takes a page a step; steps run in any order."""
    waiting = sorted(asked, key=lambda request: request[2])
    live: list[list[int]] = []  # held, most
    for step in range(1000):
        while waiting and waiting[0][2] <= step:
            first, more, _ = waiting.pop(0)
            live.append([0, first + more, first])
        claims = [Claim(held, min(max(held + 1, first), most), most) for held, most, first in live]
        free = budget - sum(held for held, _, _ in live)
        granted = [index for index, may in enumerate(may_take(free, claims)) if may]
        assert granted or not live, "a pause that does not end"
        chosen = [index for index in granted if random.random() < 0.7] or granted[:1]
        ended = [index for index in chosen if live[index][0] == live[index][1]]
        for index in chosen:
            live[index][0] = claims[index].next
        assert sum(held for held, _, _ in live) <= budget
        live = [one for index, one in enumerate(live) if index not in ended]
        if not live and not waiting:
            return
    raise AssertionError("not everyone finished")
