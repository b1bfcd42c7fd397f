"""The host cache keeps what an LRU cache keeps, or by cost what is dearest to read again; and frees no more than it must."""

from collections import OrderedDict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.residency.cache import HostCache

pytestmark = pytest.mark.cpu

PAGES, SIZES = 12, (3, 2, 6, 4, 1, 5)
accesses = st.lists(st.integers(0, len(SIZES) - 1), max_size=40)


def access(cache, model, now_ns, read_ns=1):
    """As a store does: pin what is there, else read it into room that others leave; then let go."""
    if cache.pin(model, now_ns) is None:
        assert cache.reserve(model, SIZES[model], now_ns) is not None
        cache.written(model, read_ns)
    cache.unpin(model)


@given(accesses)
def test_what_stays_is_what_was_used_last_and_fits(models):
    cache, kept = HostCache(PAGES, "lru"), OrderedDict()
    for now, model in enumerate(models, start=1):
        access(cache, model, now)
        if model not in kept:
            while sum(kept.values()) + SIZES[model] > PAGES:
                kept.popitem(last=False)
        kept[model] = SIZES[model]
        kept.move_to_end(model)
        assert cache.held() == set(kept) and cache.free_pages == PAGES - sum(kept.values())


@given(accesses, st.lists(st.integers(1, 100), min_size=len(SIZES), max_size=len(SIZES)))
def test_by_cost_nobody_leaves_for_one_that_was_cheaper_to_bring_back(models, read_ns):
    cache, used = HostCache(PAGES, "cost"), {}
    for now, model in enumerate(models, start=1):
        before = cache.held()
        access(cache, model, now, read_ns[model])
        gone, stayed = before - cache.held(), before & cache.held() - {model}
        dear = {one: read_ns[one] / (now - used[one]) for one in before - {model}}
        assert all(dear[one] <= dear[other] for one in gone for other in stayed)
        used[model] = now


def test_what_is_promised_is_written_by_who_claims_it_and_nobody_else_begins_to():
    cache = HostCache(PAGES, "lru")
    access(cache, 0, now_ns=1)
    assert cache.promise(1, SIZES[1]) and not cache.promise(1, SIZES[1])
    assert not cache.promise(2, PAGES)  # nobody leaves for a promise
    assert cache.held() == {0}
    assert cache.pin(1, 2) is None and cache.reserve(1, SIZES[1], 2) is None  # whoever wants it waits
    assert cache.claim(0) is None and cache.claim(2) is None
    runs = cache.claim(1)
    assert sum(count for _, count in runs) == SIZES[1] and cache.claim(1) is None
    cache.written(1, took_ns=5)
    cache.unpin(1)
    assert cache.pin(1, 3) == runs
