"""Admission: promises never exceed the budget, order is kept, nobody starves, and every request ends once."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.admission import AdmissionLimits, AdmissionQueue, most_free, safe
from serving.errors import UserError
from serving.memory.kv_pool import KVGeometry

pytestmark = pytest.mark.cpu

GEOMETRIES = (KVGeometry("a", 2, 100, 400), KVGeometry("b", 3, 700, 1000))


def queue_of(budget_pages=30, max_running=3, max_queued=5, **rule):
    return AdmissionQueue(AdmissionLimits(budget_pages, 4096, max_running, max_queued, **rule), GEOMETRIES)


@given(st.lists(st.one_of(st.tuples(st.sampled_from("ab"), st.integers(2, 1200)), st.integers(0, 9)), max_size=80))
def test_promises_stay_within_budget_and_admission_is_first_come_first_served(actions):
    queue = queue_of()
    offered, running, order = [], {}, []
    for number, action in enumerate(actions):
        if isinstance(action, tuple):
            model, tokens = action
            if not queue.offer(number, model, tokens - 1, 1):
                offered.append(number)
        elif running:
            finished = list(running)[action % len(running)]
            running.pop(finished)
            queue.finish(finished)
        for request_id in queue.admit():
            order.append(request_id)
            running[request_id] = actions[request_id]
        pages = sum(next(g for g in GEOMETRIES if g.model == m).pages(t, 4096) for m, t in running.values())
        assert queue.promised_pages == pages <= 30
        assert all(sum(m == name for m, _ in running.values()) <= 3 for name in "ab")
        assert len(order) + queue.queued == len(offered)
    while running:  # as requests end, everything that was queued gets its turn
        queue.finish(running.popitem()[0])
        for request_id in queue.admit():
            order.append(request_id)
            running[request_id] = actions[request_id]
    assert order == offered
    assert queue.promised_pages == queue.queued == 0


events = st.lists(
    st.one_of(
        st.tuples(st.just("offer"), st.sampled_from("ab"), st.integers(1, 25), st.integers(1, 15)),
        st.tuples(st.just("offer"), st.sampled_from("ab"), st.integers(1, 600), st.integers(1, 60)),
        st.tuples(st.sampled_from(["withdraw", "finish"]), st.integers(0, 40)),
        st.tuples(st.just("wait"), st.floats(0, 4)),
    ),
    min_size=15,
    max_size=50,
)


@given(events, st.sampled_from(["cap", "quantile", "open"]), st.sampled_from([0.0, 5.0]))
def test_every_request_leaves_once_whatever_is_withdrawn_or_expires(actions, rule, deadline_s):
    """Withdrawn, expired, rejected or finished, each request exactly once; what it was promised or waited for is void then."""
    queue = queue_of(rule=rule, deadline_s=deadline_s, promised_output_tokens={"a": 8})
    waiting, running, gone, now_s = [], [], [], 0.0
    for number, (kind, *what) in enumerate(actions):
        if kind == "offer":
            (gone if queue.offer(number, *what, now_s) else waiting).append(number)
        elif kind == "wait":
            now_s += what[0]
            for request_id in queue.expire(now_s):
                waiting.remove(request_id)
                gone.append(request_id)
        elif kind == "withdraw":
            request_id = waiting[what[0] % len(waiting)] if waiting and what[0] % 4 else what[0]
            assert queue.withdraw(request_id) == (request_id in waiting)
            if request_id in waiting:
                waiting.remove(request_id)
                gone.append(request_id)
        elif running:
            gone.append(running.pop(what[0] % len(running)))
            queue.finish(gone[-1])
        admitted = queue.admit(now_s)
        assert admitted == waiting[: len(admitted)], "first come first served"
        running, waiting = running + admitted, waiting[len(admitted) :]
        assert queue.queued == len(waiting) and (queue.promised_pages <= 30 or rule == "open")
        assert bool(queue.waiting_pages) == bool(waiting) and bool(queue.promised_pages) == bool(running)
    while waiting or running:
        gone.append(running.pop(0))
        queue.finish(gone[-1])
        admitted = queue.admit(now_s)
        running, waiting = running + admitted, waiting[len(admitted) :]
    assert sorted(gone) == [n for n, (kind, *_) in enumerate(actions) if kind == "offer"]
    assert queue.promised_pages == queue.waiting_pages == queue.queued == 0


def test_a_request_that_can_never_fit_is_rejected_at_once_with_the_reason():
    assert "context of a (400)" in queue_of().offer(1, "a", 400, 1)
    assert "exceed the pool of 2" in queue_of(budget_pages=2).offer(1, "b", 9, 1)


def test_a_full_queue_rejects():
    queue = queue_of(max_queued=1)
    assert queue.offer(1, "a", 4, 1) == ""
    assert "holds 1 requests already" in queue.offer(2, "a", 4, 1)


def test_the_quantile_rule_promises_less_and_admits_more():
    sizes = [(0, "b", 100, 800)] * 2
    by_cap, by_quantile = (
        queue_of(budget_pages=600),
        queue_of(budget_pages=600, rule="quantile", promised_output_tokens={"b": 200}),
    )
    for queue, expected in ((by_cap, 1), (by_quantile, 2)):
        for number, (_, model, prompt, output) in enumerate(sizes):
            assert queue.offer(number, model, prompt, output) == ""
        assert len(queue.admit()) == expected


def test_a_request_past_its_deadline_leaves_the_queue():
    queue = queue_of(max_running=1, deadline_s=2.0)
    for number, now_s in enumerate((0.0, 0.5, 1.5)):
        queue.offer(number, "a", 4, 1, now_s)
    assert queue.admit() == [0]
    assert queue.expire(2.4) == []
    assert queue.expire(2.6) == [1]
    queue.finish(0)
    assert queue.admit() == [2]


def test_an_unknown_rule_lists_the_known_ones():
    with pytest.raises(UserError, match="known: cap, quantile"):
        queue_of(rule="hope")


@given(st.integers(0, 20), st.lists(st.tuples(st.integers(0, 9), st.integers(0, 12)), max_size=6))
def test_safe_is_true_exactly_when_some_order_lets_all_finish(free, claims):
    def some_order(free, claims):
        return not claims or any(
            needed <= free and some_order(free + held, claims[:i] + claims[i + 1 :])
            for i, (held, needed) in enumerate(claims)
        )

    assert safe(free, claims) == some_order(free, claims)


@given(st.lists(st.tuples(st.integers(2, 40), st.integers(0, 90)), min_size=1, max_size=6), st.integers(2, 90))
def test_of_the_pools_that_can_hold_a_request_the_emptiest_takes_it(pools, tokens):
    """Each pool of so many pages has one request of so many tokens already, promised or queued."""
    queues = []
    for budget, held in pools:
        queues.append(queue_of(budget))
        if held > 1:
            queues[-1].offer(0, "a", held - 1, 1)
    before = [queue.free_pages for queue in queues]
    chosen = most_free(queues, "a", tokens)
    eligible = [queue for queue in queues if queue.holds("a", tokens)]
    if eligible:
        assert queues[chosen].free_pages == max(queue.free_pages for queue in eligible) and queues[chosen] in eligible
    for queue in queues:
        queue.admit()
    assert [queue.free_pages for queue in queues] == before
