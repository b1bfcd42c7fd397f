"""Replay is open loop, ends every request once, and keeps what it saw when a system breaks down."""

import time

import pytest

from runner.observation import COMPLETED, FAILED, REJECTED
from runner.replay import UNFINISHED, Replay
from serving.errors import WorkerDied
from serving.interface import Event, EventKind, PoolSample
from workloads.trace import TraceRequest

pytestmark = pytest.mark.cpu


class ScriptedSystem:
    """Answers each request after `delay_s` with its tokens; `fate` can hang, reject or kill instead."""

    def __init__(self, delay_s=0.01, fate=None):
        self.delay_s, self.fate, self.due, self.submitted = delay_s, fate or {}, [], []

    def submit(self, request):
        self.submitted.append((time.monotonic(), request))
        self.due.append((time.monotonic() + self.delay_s, request))

    def poll(self):
        now, events = time.monotonic(), []
        for due in [entry for entry in self.due if entry[0] <= now]:
            fate = self.fate.get(due[1].request_id)
            if fate == "hang":
                continue
            self.due.remove(due)
            events += self.answer(due[1], fate)
        return events

    def answer(self, request, fate):
        ns = time.monotonic_ns()
        if fate == "kill":
            raise WorkerDied("worker scripted/cpu:0 was killed")
        if fate == "reject":
            return [Event(request.request_id, EventKind.REJECTED, ns, reason="no room")]
        tokens = [Event(request.request_id, EventKind.TOKENS, ns, (7,)) for _ in range(request.max_new_tokens)]
        admitted, done = (Event(request.request_id, kind, ns) for kind in (EventKind.ADMITTED, EventKind.COMPLETED))
        extra = [done] if fate == "twice" else []
        if fate == "short":
            tokens.pop()
        return [admitted, *tokens, done, *extra]

    def pool_samples(self):
        return [PoolSample(time.monotonic_ns(), "cpu:0/kv-pool", {"m": 3}, 10, 4096)] if self.submitted else []

    def stats(self):
        return []


def trace(count, gap_s=0.02):
    return [TraceRequest(i, "m", i * gap_s, 2, 3, (1, 2)) for i in range(count)]


def replay(system, requests, drain_timeout_s=1.0):
    return Replay(system, requests, drain_timeout_s, poll_interval_s=0.001).run(len(requests), "test")


@pytest.mark.alone
def test_requests_go_in_when_planned_though_the_system_is_slow():
    system = ScriptedSystem(delay_s=0.3)
    started = time.monotonic()
    seen = replay(system, trace(5))
    late = [at - started - i * 0.02 for i, (at, _) in enumerate(system.submitted)]
    assert all(0 <= seconds < 0.1 for seconds in late)
    assert [r.outcome for r in seen.requests] == [COMPLETED] * 5
    assert all(r.token_ids == [7, 7, 7] and len(r.token_times_ns) == 3 for r in seen.requests)
    assert seen.pools and seen.pools[0].pages_in_use == 3


def test_of_a_sample_what_changed_is_kept_and_the_time_of_each():
    class Sampled(ScriptedSystem):
        uses = ({"m": 0, "n": 0}, {"m": 3, "n": 0}, {"m": 3, "n": 0}, {"m": 3, "n": 1})

        def pool_samples(self):
            uses, self.uses = self.uses, ()
            return [PoolSample(at, pool, use, 9, 4096) for at, use in enumerate(uses) for pool in ("a", "b")]

    seen = replay(Sampled(), trace(1)).pools
    rows = [(row.time_ns - seen[0].time_ns, row.model, row.pages_in_use) for row in seen if row.pool == "a"]
    assert rows == [(0, "m", 0), (0, "n", 0), (1, "m", 3), (2, "m", 3), (3, "n", 1)]
    assert len(seen) == 2 * len(rows)


def test_what_is_unfinished_when_the_drain_ends_has_failed():
    seen = replay(ScriptedSystem(fate={1: "hang", 2: "reject"}), trace(4), drain_timeout_s=0.1)
    assert [r.outcome for r in seen.requests] == [COMPLETED, FAILED, REJECTED, COMPLETED]
    assert seen.requests[1].reason == UNFINISHED and seen.requests[2].reason == "no room"


def test_a_dead_worker_ends_the_replay_and_keeps_the_rows():
    seen = replay(ScriptedSystem(fate={2: "kill"}), trace(6))
    assert "scripted/cpu:0 was killed" in seen.interrupted
    assert [r.outcome for r in seen.requests[:2]] == [COMPLETED, COMPLETED]
    assert {r.outcome for r in seen.requests[2:]} == {FAILED}


def test_a_request_that_ends_twice_is_a_bug_that_shows():
    with pytest.raises(RuntimeError, match="ended as completed and then had completed"):
        replay(ScriptedSystem(fate={0: "twice"}), trace(1))


def test_a_request_that_completes_short_of_tokens_is_a_bug_that_shows():
    with pytest.raises(RuntimeError, match="completed with 2 tokens, 3 were asked for"):
        replay(ScriptedSystem(fate={0: "short"}), trace(1))
