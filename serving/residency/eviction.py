"""Which of several models goes first, on a device and in the host cache. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from serving.errors import UserError

RULES = ("lru", "cost")


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model that may go: what it holds, when it was last used, and what getting it back takes."""

    key: int
    pages: int
    used_ns: int
    load_ns: int


def require_rule(rule: str) -> None:
    """Raises UserError for an unknown rule, listing the known."""
    if rule not in RULES:
        raise UserError(f"unknown eviction rule {rule!r}; known: {', '.join(RULES)}")


def eviction_order(candidates: Sequence[Candidate], rule: str, now_ns: int) -> list[Candidate]:
    """`candidates`, first to go first: by `lru` the one unused for longest; by `cost` the one that is cheapest to get back for
    the time since its use (a model unused for twice as long may be twice as dear)."""
    if rule == "lru":
        return sorted(candidates, key=lambda one: (one.used_ns, one.key))
    return sorted(candidates, key=lambda one: (one.load_ns / max(now_ns - one.used_ns, 1), one.used_ns, one.key))


def victims(candidates: Sequence[Candidate], needed_pages: int, rule: str, now_ns: int) -> list[int] | None:
    """Keys of those that go to free `needed_pages`, none that could stay; None where all together do not suffice."""
    chosen: list[Candidate] = []
    freed = 0
    for one in eviction_order(candidates, rule, now_ns):
        if freed >= needed_pages:
            break
        chosen.append(one)
        freed += one.pages
    if freed < needed_pages:
        return None
    for one in list(chosen):  # the last one may have made an earlier one's leaving needless
        if freed - one.pages >= needed_pages:
            chosen.remove(one)
            freed -= one.pages
    return [one.key for one in chosen]
