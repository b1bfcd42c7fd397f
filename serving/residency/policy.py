"""What a policy that swaps models sees of its device, and what it says. Pure data: both backends build the same views.

A model is *absent*, *loading* (its layers run as they come) or *resident*. A sequence is *seated* while the KV pool has
promised it all pages that it may ever need; only seated ones compute. Where a policy lets models give way, their sequences
may be moved to host memory, KV and all, to seat others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class ModelView:
    """One model. Times are nanoseconds on the device's clock; `oldest_ns` and `oldest_prompt_ns` are arrivals, None where no
    sequence (no prompt yet to compute) waits. `step_ns` is a decode step's measured time, 0 before the first."""

    image_pages: int
    resident: bool
    loading: bool
    live: int  # sequences that have not ended
    seated: int
    prompts: int  # live sequences whose prompt is not computed yet
    oldest_ns: int | None
    oldest_prompt_ns: int | None
    used_ns: int  # when its last step ended
    loaded_ns: int  # since when it is resident
    step_ns: int
    load_ns: int  # what loading it takes, as far as is known

    @property
    def absent(self) -> bool:
        return not (self.resident or self.loading)


@dataclass(frozen=True, slots=True)
class DeviceView:
    """A device at `now_ns`: its models by number, pages of its weights arena, and whether a load is under way."""

    now_ns: int
    models: tuple[ModelView, ...]
    free_pages: int
    link_busy: bool


@dataclass(frozen=True, slots=True)
class Decision:
    """`step`: models that may step. `seat`: models whose sequences may take KV, oldest sequence first. `give_way`: models whose
    KV may go to host memory to make seats, first first. `load`: what to load next, once `evict` is gone; a model is never
    evicted within a step. `again_ns`: when to ask again though nothing has happened. `settled`: steps that end no sequence
    change nothing of it, so that after those nobody asks."""

    step: tuple[int, ...]
    seat: tuple[int, ...]
    load: int | None = None
    evict: tuple[int, ...] = ()
    give_way: tuple[int, ...] = ()
    again_ns: int | None = None
    settled: bool = False


class SwapPolicy(Protocol):
    """Asked whenever something happened on the device: a request came, a step or a load ended, time that it named came."""

    def decide(self, view: DeviceView) -> Decision: ...
