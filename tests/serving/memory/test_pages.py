"""The page lender: no interleaving of lending and returning loses a page or lends one twice."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.errors import CapacityError
from serving.memory.pages import PageLender, contiguous_runs

pytestmark = pytest.mark.cpu


@given(
    st.integers(0, 40),
    st.lists(
        st.tuples(st.sampled_from(["lend", "give back", "keep", "take", "forget"]), st.integers(0, 12)), max_size=60
    ),
)
def test_no_page_is_lost_or_lent_twice(num_pages, actions):
    lender = PageLender(num_pages)
    held: list[list[int]] = []
    kept: list[list[int]] = []
    for action, amount in actions:
        if action == "lend":
            if amount > lender.free_pages:
                with pytest.raises(CapacityError):
                    lender.lend(amount)
            else:
                held.append(lender.lend(amount))
        elif action in ("give back", "keep") and held:
            pages = held.pop(amount % len(held))
            if action == "keep":
                lender.keep(pages)
                kept.append(pages)
            else:
                lender.give_back(pages)
        elif action in ("take", "forget") and kept:
            pages = kept.pop(amount % len(kept))
            if action == "forget":
                lender.forget(pages)
            elif lender.take(pages):
                held.append(pages)
        lent = [page for pages in held for page in pages]
        assert len(lent) == len(set(lent)) == lender.lent_pages
        assert lender.free_pages + lender.lent_pages == num_pages
        assert all(0 <= page < num_pages for page in lent)


def test_what_is_kept_is_lent_last_and_can_be_had_again_until_then():
    lender = PageLender(6)
    first, second = lender.lend(2), lender.lend(2)
    lender.keep(first)
    assert lender.free_pages == 4
    assert lender.lend(2) == [4, 5], "others before those that are kept"
    assert lender.take(first) and lender.free_pages == 0
    lender.keep(second)
    lender.keep(first)
    assert lender.lend(1) == [2], "the one that has been kept for longest"
    assert not lender.take(second) and lender.take(first)
    with pytest.raises(ValueError, match="not lent"):
        lender.keep([3])


def test_a_page_cannot_be_returned_twice():
    lender = PageLender(3)
    pages = lender.lend(2)
    lender.give_back(pages)
    with pytest.raises(ValueError, match="not lent"):
        lender.give_back(pages)


def test_lends_lowest_pages_first_so_that_runs_are_contiguous():
    lender = PageLender(8)
    first, second = lender.lend(3), lender.lend(3)
    lender.give_back(first)
    assert lender.lend(4) == [0, 1, 2, 6]
    assert second == [3, 4, 5]


@given(st.sets(st.integers(0, 50)).map(sorted))
def test_contiguous_runs_cover_exactly_the_pages(pages):
    runs = contiguous_runs(pages)
    assert [first + i for first, count in runs for i in range(count)] == pages
    assert all(a[0] + a[1] < b[0] for a, b in itertools.pairwise(runs))
