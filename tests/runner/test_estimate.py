"""Fig. 6 as an estimate: KV that one replica cannot hold counts for nothing, and the pool keeps all bins above zero."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.estimate import BINS, Room, live_requests, main

pytestmark = pytest.mark.cpu


def test_one_request_uses_one_replica():
    halves = {"m": [Room(("a",), 1), Room(("b",), 1)]}
    assert live_requests({"a": 10, "b": 10}, halves, 10) == 2
    assert live_requests({"a": 10, "b": 10}, halves, 11) == 0
    assert live_requests({"a": 10, "b": 10}, {"m": [Room(("a", "b"), 1)]}, 10) == 1


@given(st.dictionaries(st.sampled_from("abc"), st.integers(0, 1000), min_size=3), st.integers(1, 300))
def test_never_more_than_there_is(free, tokens):
    rooms = {"m": [Room((name,), 2) for name in free], "n": [Room(tuple(free), 1)]}
    count = live_requests(free, rooms, tokens)
    assert count * tokens * (2 + len(free)) <= sum(free.values())


def test_the_papers_shape(capsys):
    """Baselines fall to zero in the longer bins, CrossPool stays positive throughout (paper, Fig. 6)."""
    assert main([]) == 0
    rows = {}
    for line in capsys.readouterr().out.splitlines()[1:]:
        name, reserve_gib, *rates = line.split()
        rows.setdefault(name, {})[float(reserve_gib)] = list(map(float, rates))
    for by_reserve in rows.values():
        assert all(len(rates) == len(BINS) and rates == sorted(rates, reverse=True) for rates in by_reserve.values())
        for rates in zip(*(by_reserve[reserve] for reserve in sorted(by_reserve)), strict=True):
            assert list(rates) == sorted(rates, reverse=True), "the less memory, the lower the rate"
    assert all(min(rates) > 0 for rates in rows["paper-crosspool"].values())
    assert rows["paper-static"][4][-1] == rows["paper-elastic"][4][-1] == 0
