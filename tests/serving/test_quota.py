"""KV quotas: their sum stays, they move towards who is crowded and waits, and large requests do not wait for ever."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.errors import UserError
from serving.growth import CountedPages, PreemptingGrowth
from serving.quota import QuotaRule, Quotas, adapted, proportional
from serving.sequence import Sequence

pytestmark = pytest.mark.cpu

states = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20), st.integers(0, 30)), min_size=1, max_size=5)


@given(states, st.integers(0, 4))
def test_adaptation_keeps_the_sum_and_never_goes_below_zero(models, first):
    quotas, held, wanted = map(list, zip(*models, strict=True))
    new = adapted(quotas, held, wanted, 0.9, first)
    assert sum(new) == sum(quotas) and min(new) >= 0
    idle = [m for m in range(len(new)) if not wanted[m] and quotas[m] >= held[m]]
    if all(w <= q for w, q in zip(wanted, quotas, strict=True)):
        assert all(new[m] >= held[m] for m in idle), "what an idle model uses is not taken"


@given(states, st.floats(0.1, 1.0), st.integers(0, 4))
def test_quota_moves_towards_the_backlogged_only(models, crowded, first):
    """Where no request is larger than its quota: who waits never loses, who does not never gains; where nobody who waits is
    crowded or cut short, nothing moves."""
    quotas, held, wanted = map(list, zip(*models, strict=True))
    wanted = [min(pages, quota) for pages, quota in zip(wanted, quotas, strict=True)]
    new = adapted(quotas, held, wanted, crowded, first)
    for model, quota in enumerate(quotas):
        assert new[model] >= quota if wanted[model] else new[model] <= quota
    short = [w > q - h or h >= crowded * q for q, h, w in zip(quotas, held, wanted, strict=True)]
    if not any(w and s for w, s in zip(wanted, short, strict=True)):
        assert new == quotas


@given(st.integers(1, 4), st.integers(8, 40), st.integers(0, 3))
def test_a_model_that_stays_backlogged_comes_to_hold_nearly_all(idle, pool, backlogged):
    """Adapted again and again, quota goes where requests are, and comes back when they do."""
    count, pages = idle + 1, Quotas(QuotaRule(tuple([1.0] * (idle + 1))), pool)
    busy = backlogged % count
    for _ in range(12):
        pages.adapt([pages.pages[m] if m == busy else 0 for m in range(count)], [int(m == busy) for m in range(count)])
    assert pages.pages[busy] >= pool - idle and sum(pages.pages) == pool
    other = (busy + 1) % count
    for _ in range(12):
        pages.adapt([0 if m == busy else pages.pages[m] for m in range(count)], [int(m == other) for m in range(count)])
    assert pages.pages[other] >= pages.pages[busy]


def test_quota_moves_from_the_idle_to_the_crowded_that_wait():
    assert adapted([10, 10], [0, 10], [0, 3], 0.9) == [5, 15]
    assert adapted([10, 10], [4, 9], [0, 3], 0.9) == [7, 13]
    assert adapted([10, 10], [0, 10], [0, 0], 0.9) == [10, 10], "crowded, but nobody waits"
    assert adapted([10, 10], [0, 4], [0, 3], 0.9) == [10, 10], "it waits for its turn, not for pages"
    assert adapted([10, 10, 10], [0, 10, 9], [0, 2, 2], 0.9) == [5, 13, 12]


def test_a_request_larger_than_its_quota_gets_one_that_holds_it():
    assert adapted([5, 5], [0, 0], [8, 0], 0.9)[0] >= 8
    assert adapted([8, 2], [8, 0], [8, 7], 0.9, first=1) == [3, 7], "also from what another holds all the time"


def test_shares_are_proportional_and_checked():
    assert proportional([2, 1, 1]) == (0.5, 0.25, 0.25) and proportional([0, 0]) == (0.5, 0.5)
    assert sum(Quotas(QuotaRule((0.5, 0.3, 0.2)), 11).pages) == 11
    with pytest.raises(UserError, match="must not be negative"):
        QuotaRule((1.5, -0.5))


requests = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 6), st.integers(1, 6), st.integers(0, 30)), max_size=14)


@pytest.mark.parametrize("quotas", [None, (0.4, 0.4, 0.2), (1.0, 0.0, 0.0)], ids=str)
@given(requests, st.integers(12, 20), st.integers(1, 4), st.randoms(use_true_random=False))
def test_growth_that_preempts_finishes_everyone_whatever_comes(quotas, asked, budget, most_running, rng):
    """Requests (model, prompt, output, when it comes); a token is a page, and what is preempted is computed again."""
    source = CountedPages(budget)
    rule = Quotas(QuotaRule(quotas, interval_s=5.0), budget) if quotas else None
    growth = PreemptingGrowth(3, source, lambda model, tokens: tokens, most_running, rule)
    waiting = sorted(enumerate(asked), key=lambda item: item[1][3])
    live: list[Sequence] = []
    now = preemptions = 0
    while waiting or live:
        while waiting and waiting[0][1][3] <= now:
            number, (model, prompt, output, _) = waiting.pop(0)
            live.append(Sequence(number, model, [0] * prompt, prompt, output))
            growth.add(live[-1])
        may = growth.may_step(float(now))
        for request_id in growth.take_preempted():
            preemptions += 1
            (victim,) = [s for s in live if s.request_id == request_id]
            assert not victim.cached
        assert sum(growth.held_pages) + source.free_pages == budget and source.free_pages >= 0
        allowed = [s for s in live if may(s)]
        assert allowed or not live, "a deadlock"
        for s in [s for s in allowed if rng.random() < 0.8] or allowed[:1]:
            s.cached = len(s.tokens)
            if s.append(0):
                growth.remove(s)
                live.remove(s)
        now += 1
        assert now < 2000, "somebody starves"
    assert source.free_pages == budget
    if sum(prompt + output for _, prompt, output, _ in asked) <= budget and quotas is None:
        assert not preemptions


def test_the_youngest_is_preempted_and_recovers_before_anyone_younger_begins():
    source = CountedPages(10)
    growth = PreemptingGrowth(1, source, lambda model, tokens: tokens, 8)
    old, young, new = (Sequence(i, 0, [0] * 4, 4, 9) for i in range(3))
    growth.add(old)
    growth.add(young)
    for s in (old, young):
        assert growth.may_step(0.0)(s)
        s.tokens += [0, 0]
    growth.add(new)
    may = growth.may_step(0.0)
    assert [may(s) for s in (old, young, new)] == [True, False, False]
    assert growth.take_preempted() == (1,) and young.cached == 0
    growth.remove(old)
    may = growth.may_step(0.0)
    assert [may(s) for s in (young, new)] == [True, True]
