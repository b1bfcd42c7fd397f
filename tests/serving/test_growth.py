"""Growth without an arbiter: pages are conserved, the oldest go first, and only the youngest lose what they hold."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.growth import Claim, CountedPages, PreemptingGrowth, grow_or_preempt
from serving.sequence import Sequence

pytestmark = pytest.mark.cpu

claims_lists = st.lists(st.builds(lambda held, more: Claim(held, held + more), st.integers(0, 9), st.integers(0, 5)))


@given(st.integers(0, 40), claims_lists)
def test_pages_are_conserved_and_each_claim_has_one_answer(free, claims):
    granted, preempted = grow_or_preempt(free, claims)
    assert not set(granted) & set(preempted)
    assert all(claims[index].held for index in preempted)
    kept = [index for index in granted if claims[index].held]
    assert not kept or not preempted or max(kept) < min(preempted), "the youngest give way"
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


arrivals = st.lists(
    st.tuples(st.integers(0, 2), st.integers(1, 6), st.integers(1, 6), st.integers(0, 30), st.booleans()), max_size=14
)


@given(arrivals, st.integers(12, 20), st.integers(1, 4), st.randoms(use_true_random=False))
def test_engines_without_an_arbiter_map_first_come_first_served_and_all_finish(asked, budget, most_running, rng):
    """Three engines on one device's pages, in any order. Whoever asks gets what is free; what an engine decides never takes
    what another holds; whoever was preempted recovers before anyone younger of its engine begins. Some are cancelled."""
    source = CountedPages(budget)
    engines = [PreemptingGrowth(1, source, lambda model, tokens: tokens, most_running) for _ in range(3)]
    coming = sorted(enumerate(asked), key=lambda one: one[1][3])
    live: list[list[Sequence]] = [[], [], []]
    turn = 0
    while coming or any(live):
        while coming and coming[0][1][3] <= turn:
            number, (engine, prompt, output, _, _) = coming.pop(0)
            live[engine].append(Sequence(number, 0, [0] * prompt, prompt, output))
            engines[engine].add(live[engine][-1])
        for engine in rng.sample(range(3), 3):
            growth, before, free = engines[engine], [e.held_pages for e in engines], source.free_pages
            may = growth.may_step(float(turn))
            preempted = growth.take_preempted()
            assert [e.held_pages for e in engines if e is not growth] == [
                held for e, held in zip(engines, before, strict=True) if e is not growth
            ]
            assert sum(sum(e.held_pages) for e in engines) + source.free_pages == budget and source.free_pages >= 0
            wanted = sum(len(one.tokens) for one in live[engine])
            assert not preempted or wanted > free + sum(before[engine]), "preempted though all fit"
            allowed = [one for one in live[engine] if may(one)]
            if preempted:
                oldest = min(place for place, one in enumerate(live[engine]) if one.request_id in preempted)
                assert all(one.cached or place < oldest for place, one in enumerate(live[engine]) if one in allowed)
            for one in [one for one in allowed if rng.random() < 0.8] or allowed[:1]:
                one.cached = len(one.tokens)
                one.cancelled |= asked[one.request_id][4] and rng.random() < 0.2
                if one.append(0):
                    growth.remove(one)
                    live[engine].remove(one)
        turn += 1
        assert turn < 2000, "somebody starves"
    assert source.free_pages == budget
