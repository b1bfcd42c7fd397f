"""How long a model decodes before the next one has its turn. Pure; Aegaeon (SOSP '25), section 4.3.

A token that comes earlier than its target buys time for the ones after it. With `n = target / step` tokens generated in the
time of one target, turns `q = c / (n (a - sum 1/n))` make a round of `c` seconds of switches and all turns give every model the
same lead: per round each generates tokens worth `round / a` seconds of targets. `a` is 1 or less where all can be on time; it
is kept at 0.5 or more (no use in being faster than twice), and large enough that no turn exceeds its most.
"""

from __future__ import annotations

from collections.abc import Sequence

_LEAST_SLACK = 0.5


def quotas_s(step_s: Sequence[float], switch_s: float, target_s: float, most_s: float) -> list[float]:
    """Seconds of a turn of each model, given what a decode step of it takes, what all switches of a round take, and the time
    between tokens that is wanted. Each is at least one step, at most `most_s` or one step."""
    speed = [target_s / max(step, 1e-9) for step in step_s]
    if not speed:
        return []
    load = sum(1 / n for n in speed)
    slack = max(switch_s / (min(speed) * most_s) + load, _LEAST_SLACK)
    room = slack - load
    turns = []
    for n, step in zip(speed, step_s, strict=True):
        turn = switch_s / (n * room) if room > 0 else 0.0
        turns.append(max(min(turn, most_s), step))
    return turns
