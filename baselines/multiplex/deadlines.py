"""One queue a device, ordered so that as many requests as can be get their first token in time (Prism; Moore and Hodgson, 1968).

Requests of all models of a device wait here, not in their engines, and a few prompts at once are let through: whichever goes
next is decided as late as can be. What a prompt takes is learned from those before it; nothing else is known of the device.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence

from serving.admission import AdmissionLimits, AdmissionQueue
from serving.memory.kv_pool import KVGeometry

_KEPT = 0.8  # of an estimate, when a new measurement comes


def moore_hodgson(now_s: float, jobs: Sequence[tuple[float, float]]) -> tuple[list[int], list[int]]:
    """Of `jobs` (seconds of work, deadline), done one after the other from `now_s` on: those that meet their deadlines when
    done in this order, as many as any order can have, and the others, by deadline. Ties in the order given."""
    on_time: list[tuple[float, int]] = []  # a heap, the longest first
    end_s, late = now_s, []
    by_deadline = sorted(range(len(jobs)), key=lambda index: jobs[index][1])
    for index in by_deadline:
        work_s, deadline_s = jobs[index]
        heapq.heappush(on_time, (-work_s, index))
        end_s += work_s
        if end_s > deadline_s:
            longest_s, gone = heapq.heappop(on_time)
            end_s += longest_s
            late.append(gone)
    lost = set(late)
    return [index for index in by_deadline if index not in lost], [index for index in by_deadline if index in lost]


class DeadlineQueue(AdmissionQueue):
    """The requests of one device. `slo_s(model)` is the time to the first token that is wanted; at most `prompts_at_once` that
    were let in have none yet. Under the rule `cap` promises fit the pool together, and who comes first in the order waits
    for that."""

    minds_first_tokens = True

    def __init__(
        self,
        limits: AdmissionLimits,
        geometries: Sequence[KVGeometry],
        slo_s: Callable[[str], float],
        prompts_at_once: int,
    ) -> None:
        super().__init__(limits, geometries)
        self._slo_s, self._prompts_at_once = slo_s, prompts_at_once
        self._prompts: dict[int, int] = {}  # tokens of those that have no token yet
        self._let_in_s: dict[int, float] = {}
        self._freed_s = 0.0  # when the newest first token came
        self._token_s: dict[str, float] = {}  # seconds that a token of a model's prompt takes

    def offer(self, request_id: int, model: str, prompt_tokens: int, output_tokens: int, now_s: float = 0.0) -> str:
        problem = super().offer(request_id, model, prompt_tokens, output_tokens, now_s)
        if not problem:
            self._prompts[request_id] = prompt_tokens
        return problem

    def admit(self, now_s: float = 0.0) -> list[int]:
        """Those that may start now, in order of the policy."""
        admitted = []
        while self._waiting and len(self._let_in_s) < self._prompts_at_once:
            index = self._next(now_s)
            if index is None or not self._fits(self._waiting[index]):
                break
            chosen = self._waiting[index]
            del self._waiting[index]
            self._start(chosen)
            self._let_in_s[chosen.request_id] = now_s
            admitted.append(chosen.request_id)
        return admitted

    def first_token(self, request_id: int, model: str, now_s: float) -> None:
        """A request that was let in has its first token; the time since it or the one before came is what its prompt took."""
        let_in_s = self._let_in_s.pop(request_id, None)
        if let_in_s is None:
            return
        measured = max(now_s - max(let_in_s, self._freed_s), 0.0) / self._prompts.pop(request_id)
        known = self._token_s.get(model)
        self._token_s[model] = measured if known is None else _KEPT * known + (1 - _KEPT) * measured
        self._freed_s = now_s

    def expire(self, now_s: float) -> list[int]:
        late = super().expire(now_s)
        for request_id in late:
            del self._prompts[request_id]
        return late

    def withdraw(self, request_id: int) -> bool:
        waited = super().withdraw(request_id)
        if waited:
            del self._prompts[request_id]
        return waited

    def work_s(self, model: str, prompt_tokens: int) -> float:
        """What a prompt is expected to take; nothing before one of its model was seen."""
        return self._token_s.get(model, 0.0) * prompt_tokens

    def _next(self, now_s: float) -> int | None:
        """The waiting request that goes next: of those whose model may run one more, the first in order."""
        able = [
            index
            for index, waiting in enumerate(self._waiting)
            if self._running[waiting.model] < self.limits.max_running
        ]
        jobs = []
        for index in able:
            waiting = self._waiting[index]
            work_s = self.work_s(waiting.model, self._prompts[waiting.request_id])
            jobs.append((work_s, waiting.since_s + self._slo_s(waiting.model)))
        on_time, late = moore_hodgson(now_s, jobs)
        return able[(on_time or late)[0]] if able else None
