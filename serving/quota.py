"""KV quotas of models that share one pool, and their adaptation (MuxServe, ICML '24, section 3.4). Pure.

A model may hold its quota of the pool's pages and no more. Now and then quota moves from models that do not use theirs to
models that use nine tenths of it or more and have requests waiting. A request that is larger than its model's quota waits for
that too, so that a quota never makes a request impossible that the pool could hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from serving.errors import UserError


@dataclass(frozen=True)
class QuotaRule:
    """`shares` of the pool by model, in proportion; re-adapted every `interval_s` seconds (0: never) in favour of
    models that hold `crowded` of their quota or more."""

    shares: tuple[float, ...]
    interval_s: float = 8.0
    crowded: float = 0.9

    def __post_init__(self) -> None:
        if any(share < 0 for share in self.shares):
            raise UserError(f"KV quotas must not be negative, got {list(self.shares)}")
        if self.interval_s < 0 or not 0 < self.crowded <= 1:
            raise UserError("quota adaptation: the interval must be 0 or more, and crowded in (0, 1]")


def proportional(weights: Sequence[float]) -> tuple[float, ...]:
    """Shares in proportion to `weights`; equal ones where all are 0."""
    total = sum(weights)
    return tuple(weight / total for weight in weights) if total else tuple(1 / len(weights) for _ in weights)


def adapted(
    quotas: Sequence[int], held: Sequence[int], wanted: Sequence[int], crowded: float, first: int = 0
) -> list[int]:
    """New quotas in pages, of the same sum. `wanted` is what each model's first waiting request needs, 0 where none waits.

    A model in need waits and is crowded, or is kept waiting by the quota itself. Models for which nobody waits give half of
    what they do not use, the needy share it equally. Then, from model `first` on, whoever waits for more than its quota is
    given that from what others do not use; where it holds nothing at all, also from what they use: they keep what they
    hold, but take no more until they are back below their quota. That keeps large requests of one model from waiting for
    ever behind those of another."""
    new = list(quotas)
    models = range(len(new))
    needy = [m for m in models if wanted[m] and (held[m] >= crowded * quotas[m] or wanted[m] > quotas[m] - held[m])]
    if not needy:
        return new
    given = 0
    for m in models:
        if not wanted[m]:
            spare = max(quotas[m] - held[m], 0) // 2
            new[m] -= spare
            given += spare
    for place, m in enumerate(needy):
        new[m] += given // len(needy) + (place < given % len(needy))
    served: set[int] = set()
    for m in sorted(needy, key=lambda m: (m - first) % len(new)):
        missing = wanted[m] - new[m]
        for other in sorted(models, key=lambda o: held[o] - new[o]):  # most unused first
            if missing <= 0:
                break
            if other == m:
                continue
            floor = max(wanted[other] if other in served else 0, held[other] if held[m] else 0)
            taken = min(missing, max(new[other] - floor, 0))
            new[other] -= taken
            new[m] += taken
            missing -= taken
        served.add(m)
    return new


class Quotas:
    """Quotas of the models of one pool, as they are now: `pages[model]`, of the sum `pool_pages`."""

    def __init__(self, rule: QuotaRule, pool_pages: int) -> None:
        self._rule = rule
        shares = proportional(rule.shares)
        self.pages = [int(share * pool_pages) for share in shares]
        for place in range(pool_pages - sum(self.pages)):  # what rounding left
            self.pages[place % len(self.pages)] += 1
        self._next_s = 0.0
        self.adaptations = 0

    def due(self, now_s: float) -> bool:
        """Whether it is time to adapt; the first call only starts the first interval."""
        if not self._rule.interval_s or now_s < self._next_s:
            return False
        starts, self._next_s = not self._next_s, now_s + self._rule.interval_s
        return not starts

    def adapt(self, held: Sequence[int], wanted: Sequence[int]) -> None:
        """New quotas, the models taking turns at being first."""
        self.pages = adapted(self.pages, held, wanted, self._rule.crowded, self.adaptations % len(self.pages))
        self.adaptations += 1
