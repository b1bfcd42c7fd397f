"""Admission: which requests may hold KV. A pure policy over page counts; it sees no clock, no tensor and no process.

The rule is *reserve the declared cap*: a request is admitted when the pages of its prompt and all its output tokens fit
beside what is already promised, so an admitted request never runs out and is never preempted (the paper's virtualizer).
The queue is first come first served across all models of a pool, so none starves; a request that could never fit is
rejected at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from serving.memory.kv_pool import KVGeometry


@dataclass(frozen=True)
class AdmissionLimits:
    """Of one pool. `max_running` bounds the live requests of a model, `max_queued` the waiting ones of the pool."""

    budget_pages: int
    page_bytes: int
    max_running: int
    max_queued: int


class AdmissionQueue:
    """The requests of one pool between submission and their end."""

    def __init__(self, limits: AdmissionLimits, geometries: Sequence[KVGeometry]) -> None:
        self.limits = limits
        self._geometries = {geometry.model: geometry for geometry in geometries}
        self._waiting: deque[tuple[int, str, int]] = deque()  # request id, model, pages
        self._promised: dict[int, tuple[str, int]] = {}  # request id -> model, pages
        self._running = dict.fromkeys(self._geometries, 0)
        self.promised_pages = 0

    @property
    def queued(self) -> int:
        return len(self._waiting)

    def offer(self, request_id: int, model: str, tokens: int) -> str:
        """Queue a request of `tokens` tokens (prompt and output). Returns why it is rejected, or an empty string."""
        geometry = self._geometries[model]
        if tokens > geometry.max_context_tokens:
            return f"{tokens} tokens exceed the context of {model} ({geometry.max_context_tokens})"
        pages = geometry.pages(tokens, self.limits.page_bytes)
        if pages > self.limits.budget_pages:
            return f"{pages} KV pages exceed the pool of {self.limits.budget_pages}"
        if len(self._waiting) >= self.limits.max_queued:
            return f"the queue holds {self.limits.max_queued} requests already"
        self._waiting.append((request_id, model, pages))
        return ""

    def admit(self) -> list[int]:
        """The requests that may start now, in order of arrival; their pages are promised from here on."""
        admitted = []
        while self._waiting:
            request_id, model, pages = self._waiting[0]
            fits = self.promised_pages + pages <= self.limits.budget_pages
            if not fits or self._running[model] >= self.limits.max_running:
                break
            self._waiting.popleft()
            self._promised[request_id] = (model, pages)
            self._running[model] += 1
            self.promised_pages += pages
            admitted.append(request_id)
        return admitted

    def finish(self, request_id: int) -> None:
        """An admitted request has ended; its promise is void."""
        model, pages = self._promised.pop(request_id)
        self._running[model] -= 1
        self.promised_pages -= pages
