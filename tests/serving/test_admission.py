"""Admission: promises never exceed the budget, order is kept, nobody starves, and every request ends once."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.admission import AdmissionLimits, AdmissionQueue
from serving.memory.kv_pool import KVGeometry

pytestmark = pytest.mark.cpu

GEOMETRIES = (KVGeometry("a", 2, 100, 400), KVGeometry("b", 3, 700, 1000))


def queue_of(budget_pages=30, max_running=3, max_queued=5):
    return AdmissionQueue(AdmissionLimits(budget_pages, 4096, max_running, max_queued), GEOMETRIES)


@given(st.lists(st.one_of(st.tuples(st.sampled_from("ab"), st.integers(1, 1200)), st.integers(0, 9)), max_size=80))
def test_promises_stay_within_budget_and_admission_is_first_come_first_served(actions):
    queue = queue_of()
    offered, running, order = [], {}, []
    for number, action in enumerate(actions):
        if isinstance(action, tuple):
            model, tokens = action
            if not queue.offer(number, model, tokens):
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


def test_a_request_that_can_never_fit_is_rejected_at_once_with_the_reason():
    assert "context of a (400)" in queue_of().offer(1, "a", 401)
    assert "exceed the pool of 2" in queue_of(budget_pages=2).offer(1, "b", 10)


def test_a_full_queue_rejects():
    queue = queue_of(max_queued=1)
    assert queue.offer(1, "a", 5) == ""
    assert "holds 1 requests already" in queue.offer(2, "a", 5)
