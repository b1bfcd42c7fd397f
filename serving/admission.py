"""Admission: which requests may hold KV, and which may grow. Pure policies over page counts; they see no clock, no tensor
and no process.

Two rules without preemption (the paper's virtualizer) and one that leaves it to others:

- `cap`: a request is admitted when the pages of its prompt and *all* the output tokens it may ask for fit beside what is
  already promised. It never runs out.
- `quantile`: less is promised than the cap, so more requests run at once, and a request that outgrows its promise may have
  to pause until another ends. :func:`safe` (Dijkstra's banker, one resource) keeps at least one order in which all can
  finish, so a pause always ends.

- `open`: whatever the pool can hold alone is admitted, up to `max_running`. Growth decides who runs (serving/growth.py).

The queue is first come first served across all models of a pool, so none starves. A request that could never fit is
rejected at once, one that waited past its deadline when that is noticed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from serving.errors import UserError
from serving.memory.kv_pool import KVGeometry

RULES = ("cap", "quantile", "open")


@dataclass(frozen=True)
class AdmissionLimits:
    """Of one pool. `max_running` bounds the live requests of a model, `max_queued` the waiting ones of the pool;
    `deadline_s` is the longest wait (0: any). Under the rule `quantile`, `promised_output_tokens` says how many output
    tokens of a model's request are promised; a request that asks for fewer is promised those."""

    budget_pages: int
    page_bytes: int
    max_running: int
    max_queued: int
    rule: str = "cap"
    deadline_s: float = 0.0
    promised_output_tokens: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise UserError(f"unknown admission rule {self.rule!r}; known: {', '.join(RULES)}")


@dataclass(frozen=True, slots=True)
class _Waiting:
    request_id: int
    model: str
    pages: int
    since_s: float


class AdmissionQueue:
    """The requests of one pool between submission and their end. Times are seconds on whatever clock the caller has."""

    minds_first_tokens = False  # whether a first token may let another in, as the end of a request does

    def __init__(self, limits: AdmissionLimits, geometries: Sequence[KVGeometry]) -> None:
        self.limits = limits
        self._geometries = {geometry.model: geometry for geometry in geometries}
        self._waiting: deque[_Waiting] = deque()
        self._promised: dict[int, _Waiting] = {}
        self._running = dict.fromkeys(self._geometries, 0)
        self.promised_pages = 0
        self._waiting_pages = 0

    @property
    def queued(self) -> int:
        return len(self._waiting)

    @property
    def waiting_pages(self) -> int:
        """Pages that the waiting requests ask for."""
        return self._waiting_pages

    @property
    def free_pages(self) -> int:
        """What would be left if everything in the queue were admitted; negative where the queue is longer than that."""
        return self.limits.budget_pages - self.promised_pages - self._waiting_pages

    def holds(self, model: str, tokens: int) -> bool:
        """Whether a request of so many tokens fits the pool when it is alone."""
        return self._geometries[model].pages(tokens, self.limits.page_bytes) <= self.limits.budget_pages

    def offer(self, request_id: int, model: str, prompt_tokens: int, output_tokens: int, now_s: float = 0.0) -> str:
        """Queue a request. Returns why it is rejected, or an empty string."""
        geometry, limits = self._geometries[model], self.limits
        tokens = prompt_tokens + output_tokens
        if tokens > geometry.max_context_tokens:
            return f"{tokens} tokens exceed the context of {model} ({geometry.max_context_tokens})"
        pages = geometry.pages(tokens, limits.page_bytes)
        if pages > limits.budget_pages:
            return f"{pages} KV pages exceed the pool of {limits.budget_pages}"
        if len(self._waiting) >= limits.max_queued:
            return f"the queue holds {limits.max_queued} requests already"
        if limits.rule == "quantile":
            promised = min(output_tokens, limits.promised_output_tokens.get(model, output_tokens))
            pages = geometry.pages(prompt_tokens + promised, limits.page_bytes)
        self._waiting.append(_Waiting(request_id, model, pages, now_s))
        self._waiting_pages += pages
        return ""

    def admit(self, now_s: float = 0.0) -> list[int]:
        """The requests that may start now, in order of arrival; their pages are promised from here on."""
        admitted = []
        while self._waiting:
            head = self._waiting[0]
            if not self._fits(head) or self._running[head.model] >= self.limits.max_running:
                break
            self._start(self._waiting.popleft())
            admitted.append(head.request_id)
        return admitted

    def _fits(self, waiting: _Waiting) -> bool:
        return self.limits.rule == "open" or self.promised_pages + waiting.pages <= self.limits.budget_pages

    def _start(self, waiting: _Waiting) -> None:
        """Promise its pages to a request that has left the queue."""
        self._promised[waiting.request_id] = waiting
        self._running[waiting.model] += 1
        self.promised_pages += waiting.pages
        self._waiting_pages -= waiting.pages

    def expire(self, now_s: float) -> list[int]:
        """Requests that have waited past the deadline; they leave the queue and are to be rejected."""
        if not self.limits.deadline_s:
            return []
        late = [waiting.request_id for waiting in self._waiting if now_s - waiting.since_s > self.limits.deadline_s]
        if late:
            gone = set(late)
            self._waiting_pages -= sum(waiting.pages for waiting in self._waiting if waiting.request_id in gone)
            self._waiting = deque(waiting for waiting in self._waiting if waiting.request_id not in gone)
        return late

    def withdraw(self, request_id: int) -> bool:
        """Take a request that still waits out of the queue; False where it does not wait here."""
        for waiting in self._waiting:
            if waiting.request_id == request_id:
                self._waiting.remove(waiting)
                self._waiting_pages -= waiting.pages
                return True
        return False

    def finish(self, request_id: int) -> None:
        """An admitted request has ended; its promise is void."""
        held = self._promised.pop(request_id)
        self._running[held.model] -= 1
        self.promised_pages -= held.pages


def most_free(queues: Sequence[AdmissionQueue], model: str, tokens: int) -> int:
    """Which of a model's pools takes a request of so many tokens: of those that can ever hold it, the one with most free KV
    once its queue is served (the paper's rule for data-parallel ranks), which under overload is the one with the shortest
    backlog. Ties to the first."""
    eligible = [index for index, queue in enumerate(queues) if queue.holds(model, tokens)] or [0]
    return max(eligible, key=lambda index: (queues[index].free_pages, -index))


def safe(free_pages: int, claims: Iterable[tuple[int, int]]) -> bool:
    """Whether requests with `claims` of (pages held, pages still possibly needed) can all finish in some order."""
    for held, needed in sorted(claims, key=lambda claim: claim[1]):
        if needed > free_pages:
            return False
        free_pages += held
    return True
