"""Growth without an arbiter: pages go to the oldest that have begun, and who finds none takes them from the youngest. Pure.

What an elastic engine (SGLang over kvcached) does on exhaustion: it retracts its youngest running request, whose KV is dropped
and computed again once there is room. A request that has not begun gets what those that have leave, and nothing while one of
them is preempted.
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
    for index, claim in enumerate(claims):
        if not claim.held or index in preempted:
            continue
        more = max(claim.needed - claim.held, 0)
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
    for index, claim in enumerate(claims):
        if claim.held:
            continue
        if preempted or claim.needed > free_pages:
            break  # first come first served: none overtakes one that waits
        free_pages -= claim.needed
        granted.append(index)
    return sorted(granted), preempted
