"""Growth without an arbiter: pages go to the oldest sequences first, and who finds none takes them from the youngest. Pure.

What an elastic engine (SGLang over kvcached) does on exhaustion: it retracts its youngest running request, whose KV is dropped
and computed again once there is room. A request that has not begun never takes pages from one that has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Claim:
    """One sequence: pages it holds (0: it has not begun, or was preempted) and pages it needs for its next step."""

    held: int
    needed: int


def grow_or_preempt(free_pages: int, claims: Sequence[Claim]) -> tuple[list[int], list[int]]:
    """Of `claims`, oldest first, and the pages free to them: indices of those that have what they need now, and of those
    that lose what they hold."""
    granted: list[int] = []
    preempted: list[int] = []
    waits = False
    for index, claim in enumerate(claims):
        if index in preempted:
            continue
        more = max(claim.needed - claim.held, 0)
        if not claim.held:
            waits = waits or more > free_pages  # first come first served: none overtakes one that waits
            if not waits:
                free_pages -= more
                granted.append(index)
            continue
        for victim in range(len(claims) - 1, index, -1):
            if more <= free_pages:
                break
            if claims[victim].held and victim not in preempted:
                preempted.append(victim)
                free_pages += claims[victim].held
        if more <= free_pages:
            free_pages -= more
            granted.append(index)
        else:
            preempted.append(index)
            free_pages += claim.held
    return granted, preempted
