"""Options of the swap baseline."""

from __future__ import annotations

from dataclasses import dataclass

from baselines.swap.request_level import RequestLevel
from baselines.swap.token_level import TokenLevel
from serving.errors import UserError
from serving.options import EngineOptions
from serving.residency.eviction import require_rule
from serving.residency.policy import SwapPolicy

MODES = ("request", "token")
LOADER_CORES = ("own", "other")


@dataclass(frozen=True)
class SwapOptions(EngineOptions):
    """Beside what every engine has:

    `mode`: `request` (a resident model runs its queue) or `token` (models take turns between tokens). `weights_share` of a
    device, or the largest model where that is more, holds weights; the rest is KV. `host_cache_bytes` holds images of models
    (0: all of them), with `eviction` (`lru` | `cost`) in it and on devices; `host_kv_bytes` holds KV that gives way.
    `loader_core`: on a CPU device the copying thread runs on the device's `own` core, or on the `other` ones as a DMA engine
    would. `link_gbps` throttles it (null: as fast as it goes); simulated, it replaces the card's host link.
    `locality`: how much a load weighs against another device's backlog, for where a request goes. `zero_cost` is a bound, not a system: all weights are
    resident beyond the budget, and no switch takes any time.

    Request level: `keep_alive_s`, `hysteresis_s`, `prefetch`. Token level: `tbt_target_s`, `max_quota_s`."""

    mode: str = "request"
    weights_share: float = 0.6
    eviction: str = "lru"
    host_cache_bytes: int = 0
    host_kv_bytes: int = 1 << 30
    loader_core: str = "own"
    link_gbps: float | None = None
    locality: float = 1.0
    keep_alive_s: float = 0.0
    hysteresis_s: float = 1.0
    prefetch: bool = True
    tbt_target_s: float = 0.1
    max_quota_s: float = 4.0
    zero_cost: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_rule(self.eviction)
        _require_one_of("mode", self.mode, MODES)
        _require_one_of("loader_core", self.loader_core, LOADER_CORES)
        if not 0 < self.weights_share < 1:
            raise UserError(f"option weights_share is {self.weights_share!r}; it must lie between 0 and 1")
        if self.link_gbps is not None and not self.link_gbps > 0:
            raise UserError(
                f"option link_gbps is {self.link_gbps!r}: no weights would ever come; give more than 0, or null for no throttle"
            )
        for name in ("tbt_target_s", "max_quota_s"):
            if not getattr(self, name) > 0:
                raise UserError(f"option {name} is {getattr(self, name)!r}; it must be more than 0")
        for name in ("host_cache_bytes", "host_kv_bytes", "locality", "keep_alive_s", "hysteresis_s"):
            if not getattr(self, name) >= 0:
                raise UserError(f"option {name} is {getattr(self, name)!r}; it must be 0 or more")

    def policy(self, popularity: tuple[int, ...]) -> SwapPolicy:
        """The policy of one device, which knows models by number, the most popular first in `popularity`."""
        if self.mode == "token":
            return TokenLevel(self.tbt_target_s, self.max_quota_s, self.eviction, self.prefetch, popularity)
        return RequestLevel(self.eviction, self.keep_alive_s, self.hysteresis_s, self.prefetch, popularity)


def _require_one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UserError(f"option {name} is {value!r}; known: {', '.join(known)}")
