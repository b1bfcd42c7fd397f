"""Options of the multiplexing baselines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from serving.cost.contention import Contention
from serving.errors import UserError
from serving.options import EngineOptions

ADMISSIONS = ("optimistic", "reserved", "cap")


def _require(known: tuple[str, ...], name: str, value: str) -> None:
    if value not in known:
        raise UserError(f"option {name} is {value!r}; known: {', '.join(known)}")


@dataclass(frozen=True)
class ElasticOptions(EngineOptions):
    """Beside what every engine has: `groups`, which says on which devices each model lies (as for static; devices may be
    shared), and how engines that share one contend in the simulator: `contention` (`share` | `time_slice`), `interference`,
    `slice_s`, `switch_s` (serving/cost/contention.py says what each means and rests on). On CUDA devices they take turns, or with
    `mps` run at once through CUDA's Multi-Process Service.

    `admission` is what the host lets in: `optimistic` (all, up to `max_running`; engines take what they find), `reserved` (an
    engine lets in what it could promise in full if the device were its own), or `cap` (CrossPool's concurrency cap: promises
    of all engines of a device fit it together, so none is preempted; models on one device each only)."""

    groups: Mapping[str, Any] = field(default_factory=dict)
    contention: str = "share"
    interference: float | None = None
    slice_s: float = 2e-3
    switch_s: float = 1e-4
    admission: str = "reserved"
    mps: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(ADMISSIONS, "admission", self.admission)
        self.model()  # raises for a contention that makes no sense

    def model(self) -> Contention:
        return Contention(self.contention, self.interference, self.slice_s, self.switch_s)


@dataclass(frozen=True)
class PlacementOptions(ElasticOptions):
    """Beside what elastic engines have: the targets that placement and queue work towards, `ttft_slo_ms` and `tpot_slo_ms`, for a
    model in `slo_scales` times that; and how many prompts of a device may be computed at once (`prompts_at_once`; the others wait
    in its queue). Weights of a model without a request for `idle_evict_s` seconds leave their device (0: they stay). `groups` is not to be given: placement is this system's own. `admission` is `optimistic` or `cap`."""

    admission: str = "optimistic"
    ttft_slo_ms: float = 2000.0
    tpot_slo_ms: float = 200.0
    slo_scales: Mapping[str, float] = field(default_factory=dict)
    prompts_at_once: int = 2
    idle_evict_s: float = 45.0

    def __post_init__(self) -> None:
        _require(("optimistic", "cap"), "admission", self.admission)
        super().__post_init__()
        if self.groups:
            raise UserError(
                "option groups is given; elastic-placement decides itself where models lie (elastic takes groups)"
            )
        for name, value in {
            "ttft_slo_ms": self.ttft_slo_ms,
            "tpot_slo_ms": self.tpot_slo_ms,
            **{f"slo_scales of {model}": scale for model, scale in self.slo_scales.items()},
        }.items():
            if not value > 0:
                raise UserError(f"option {name} is {value!r}; it must be above 0")
        if not self.idle_evict_s >= 0:
            raise UserError(f"option idle_evict_s is {self.idle_evict_s!r}; it must be 0 or more")
        if not isinstance(self.prompts_at_once, int) or self.prompts_at_once < 1:
            raise UserError(
                f"option prompts_at_once is {self.prompts_at_once!r}; it must be a whole number of at least 1"
            )


@dataclass(frozen=True)
class QuotaOptions(EngineOptions):
    """Beside what every engine has: `quotas`, the share of its device's KV pool that each model starts with (empty: in
    proportion to rate x layers x KV width, from the demand); `adapt_every_s` seconds (0: never) quota moves to models that hold
    `crowded` of theirs and have requests waiting. `admission` is `optimistic` or `cap` (CrossPool's concurrency cap: promises
    fit the pool together)."""

    quotas: Mapping[str, float] = field(default_factory=dict)
    adapt_every_s: float = 8.0
    crowded: float = 0.9
    admission: str = "optimistic"

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(("optimistic", "cap"), "admission", self.admission)
        if not self.adapt_every_s >= 0:
            raise UserError(f"option adapt_every_s is {self.adapt_every_s!r}; it must be 0 or more")
        if any(not share > 0 for share in self.quotas.values()) or sum(self.quotas.values()) > 1 + 1e-9:
            raise UserError(
                f"option quotas is {dict(self.quotas)}; shares of the pool are above 0 and sum to at most 1, these to "
                f"{sum(self.quotas.values()):g}"
            )
        if not 0 < self.crowded <= 1:
            raise UserError(f"option crowded is {self.crowded!r}; it must be above 0 and at most 1")
