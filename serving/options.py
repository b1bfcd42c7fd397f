"""Options that every engine has, under the same names, so that a comparison can hold them equal."""

from __future__ import annotations

from dataclasses import dataclass

from serving.batching import StepLimits
from serving.errors import UserError


@dataclass(frozen=True)
class EngineOptions:
    """`max_batch` sequences and `prefill_chunk` prompt rows a step; KV pages of `page_bytes`; `max_running` live requests
    of a model and `max_queued` waiting ones of a pool, each for at most `queue_deadline_s` (0: as long as it takes). Where `timeline_dir` names a directory, each worker leaves there
    what it ran and when."""

    max_batch: int = 8
    prefill_chunk: int = 128
    page_bytes: int = 65536
    max_running: int = 64
    max_queued: int = 100_000
    queue_deadline_s: float = 0.0
    timeline_dir: str = ""

    def __post_init__(self) -> None:
        for name in ("max_batch", "prefill_chunk", "page_bytes", "max_running", "max_queued"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise UserError(f"option {name} is {value!r}; it must be a whole number of at least 1")

        if not self.queue_deadline_s >= 0:
            raise UserError(f"option queue_deadline_s is {self.queue_deadline_s!r}; it must be 0 or more")

    @property
    def limits(self) -> StepLimits:
        return StepLimits(self.max_batch, self.prefill_chunk)
