"""Pages and bytes of one device lent across processes: none twice, none lost, and nobody waits for the dead."""

import multiprocessing
import os
import random
import signal
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.errors import CapacityError
from serving.memory.lent import LentShape, SharedBudget, SharedPageLender
from serving.shm.region import SharedRegion

pytestmark = pytest.mark.cpu

ENGINES, PAGES = 3, 24
SHAPE = LentShape(PAGES, ENGINES, 1000)


@pytest.fixture
def region():
    made = SharedRegion(SHAPE.region_bytes)
    yield made
    made.close()


ACTIONS = st.sampled_from(["lend", "give back", "keep", "take", "forget"])


@given(st.lists(st.tuples(st.integers(0, ENGINES - 1), st.integers(0, 9), ACTIONS), max_size=40))
def test_whatever_engines_ask_for_no_page_is_lent_twice_or_lost(calls):
    region = SharedRegion(SHAPE.region_bytes)
    lenders = [SharedPageLender(region, SHAPE, engine) for engine in range(ENGINES)]
    held: list[list[int]] = [[] for _ in lenders]
    kept: list[list[list[int]]] = [[] for _ in lenders]
    for engine, count, action in calls:
        lender = lenders[engine]
        if action in ("give back", "keep"):
            back, held[engine] = held[engine][:count], held[engine][count:]
            if action == "keep":
                lender.keep(back)
                kept[engine].append(back)
            else:
                lender.give_back(back)
        elif action == "forget":
            lender.forget(kept[engine].pop() if kept[engine] else [])
        elif action == "take":
            wanted = kept[engine].pop(0) if kept[engine] else []
            free = not {page for pages in held for page in pages} & set(wanted)
            assert lender.take(wanted) == free, "what is kept is free to all until somebody has it"
            held[engine] += wanted if free else []
        elif count > lender.free_pages:
            with pytest.raises(CapacityError, match="are free"):
                lender.lend(count)
        else:
            held[engine] += lender.lend(count)
        everyone = [page for pages in held for page in pages]
        assert len(set(everyone)) == len(everyone) == PAGES - lender.free_pages
        assert [lender.lent_pages for lender in lenders] == [len(pages) for pages in held]
    region.close()


def test_engines_begin_in_places_of_their_own_and_keep_out_of_each_others_way(region):
    lenders = [SharedPageLender(region, SHAPE, engine) for engine in range(ENGINES)]
    pages = [lender.lend(4) for lender in lenders]
    assert pages == [[0, 1, 2, 3], [8, 9, 10, 11], [16, 17, 18, 19]]
    lenders[1].keep(pages[1])
    assert lenders[1].lend(2) == [12, 13], "others before those that are kept"
    assert lenders[0].lend(5) == [4, 5, 6, 7, 8], "nobody's are kept from others"
    assert not lenders[1].take(pages[1])
    assert lenders[2].lend(6) == [20, 21, 22, 23, 9, 10], "and around"


def test_an_engine_returns_only_what_it_has(region):
    first, second = (SharedPageLender(region, SHAPE, engine) for engine in range(2))
    pages = first.lend(2)
    with pytest.raises(ValueError, match="not lent to this engine"):
        second.give_back(pages)
    assert first.lent_pages == 2


def test_what_one_engine_waits_for_is_not_unclaimed_to_others(region):
    first, second = (SharedPageLender(region, SHAPE, engine) for engine in range(2))
    first.claim(PAGES - 4)
    assert second.unclaimed_pages == 4 and first.unclaimed_pages == second.free_pages == PAGES
    pages = second.lend(10)
    assert second.unclaimed_pages == 0
    second.give_back(pages)
    first.claim(0)
    assert second.unclaimed_pages == PAGES


def test_weights_of_all_engines_are_charged_to_one_device(region):
    budgets = [SharedBudget(region, SHAPE, engine) for engine in range(2)]
    budgets[0].charge("weights", 600)
    with pytest.raises(CapacityError, match="weights of b needs 500 bytes but 400 of 1000 are free .* 100 bytes"):
        budgets[1].charge("weights of b", 500)
    budgets[1].charge("weights of b", 400)


def _borrow_for_ever(fd: int, engine: int) -> None:
    lender = SharedPageLender(SharedRegion(SHAPE.region_bytes, fd), SHAPE, engine)
    rng, held = random.Random(engine), []
    while True:
        with lender.deciding():
            free, mine = lender.free_pages, lender.lent_pages
            assert mine == len(held)
            held += lender.lend(rng.randint(0, free))
            assert lender.free_pages + lender.lent_pages <= PAGES
        back, held = held[: len(held) // 2], held[len(held) // 2 :]
        lender.give_back(back)


def test_killed_at_any_moment_a_holder_leaves_a_whole_table_and_no_lock(region):
    context, rng = multiprocessing.get_context("fork"), random.Random(5)
    for _ in range(6):
        others = [context.Process(target=_borrow_for_ever, args=(os.dup(region.fd), engine)) for engine in (1, 2)]
        for process in others:
            process.start()
        time.sleep(rng.uniform(0.01, 0.05))
        for process in others:
            os.kill(process.pid, signal.SIGKILL)
            process.join(5)
            assert process.exitcode == -signal.SIGKILL  # no assertion of its own had ended it
        started = time.monotonic()
        lender = SharedPageLender(region, SHAPE, 0)
        mine = lender.lend(lender.free_pages)
        assert time.monotonic() - started < 1
        *_, owners = SHAPE.views(region)
        assert set(np.unique(owners)) <= {1, 2, 3} and np.count_nonzero(owners == 1) == len(mine)
        lender.give_back(mine)
        owners[:] = 0  # what the dead held
