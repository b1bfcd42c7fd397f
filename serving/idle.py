"""Weights that leave a device when their model has had no request for a while, and come back with the next. Pure.

What they leave is KV of others; until they are back there is room for them before anybody begins (serving/memory/lent.py).
"""

from __future__ import annotations

from typing import Protocol


class Comes(Protocol):
    """Where weights come and go. Called only where that changes something."""

    def bring(self) -> bool:
        """Whether they are there now; asked again until they are."""
        ...

    def evict(self) -> None: ...


class IdleWeights:
    """The weights of one model, there at first, gone after `evict_after_s` seconds without work."""

    def __init__(self, evict_after_s: float, weights: Comes) -> None:
        self._evict_after_s, self._weights = evict_after_s, weights
        self._present = True
        self._idle_since_s: float | None = None

    @property
    def due_s(self) -> float | None:
        """When the weights leave if nothing comes; None while there is work, or nothing that could leave."""
        return None if self._idle_since_s is None or not self._present else self._idle_since_s + self._evict_after_s

    def there(self, now_s: float, at_work: bool) -> bool:
        """Whether the model can compute at `now_s`, when it has work or has none."""
        if at_work:
            self._idle_since_s = None
            self._present = self._present or self._weights.bring()
        elif self._present:
            if self._idle_since_s is None:
                self._idle_since_s = now_s
            if now_s - self._idle_since_s >= self._evict_after_s:
                self._weights.evict()
                self._present = False
        return self._present
