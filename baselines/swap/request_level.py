"""Swapping between requests (ServerlessLLM, llama-swap): a resident model runs its queue, an idle one goes when another is
wanted. Pure.

The next model to load is that of the request that waits longest. Room for it is made of idle models, by the eviction rule. A
model with work is let go only where idle ones do not suffice and it has been resident for `hysteresis_s`: it takes no new
requests, ends those it has, and goes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from serving.residency.eviction import Candidate, victims
from serving.residency.policy import Decision, DeviceView


@dataclass(frozen=True)
class RequestLevel:
    """An idle model stays for `keep_alive_s` at least; where the link has nothing to do, `prefetch` brings models that nobody
    asked for yet into room that is free, the last used first, then in order of `popularity` (model numbers)."""

    eviction: str = "lru"
    keep_alive_s: float = 0.0
    hysteresis_s: float = 1.0
    prefetch: bool = True
    popularity: tuple[int, ...] = ()

    def decide(self, view: DeviceView) -> Decision:
        there: list[int] = []
        absent: list[int] = []
        for number, model in enumerate(view.models):
            (absent if model.absent else there).append(number)
        if view.link_busy:
            return Decision(step=tuple(there), seat=tuple(there), settled=True)
        waiting = [number for number in absent if view.models[number].live]
        if not waiting:
            load = self._prefetched(view, absent)
            return Decision(step=tuple(there), seat=tuple(there), load=load, settled=load is None)
        wanted = min(waiting, key=lambda n: (view.models[n].oldest_ns, n))
        leaving, again_ns = self._leaving(view, there, view.models[wanted].image_pages - view.free_pages)
        if leaving is None:
            return Decision(step=tuple(there), seat=tuple(there), again_ns=again_ns)
        seat = tuple(number for number in there if number not in leaving)
        drained = not any(view.models[number].seated for number in leaving)
        return Decision(tuple(there), seat, wanted if drained else None, tuple(leaving) if drained else ())

    def _leaving(
        self, view: DeviceView, there: Sequence[int], needed_pages: int
    ) -> tuple[list[int] | None, int | None]:
        """Who makes room for `needed_pages`; or None, and when that may have changed."""
        free_to_go: list[Candidate] = []
        busy: list[Candidate] = []
        later: list[int] = []
        for number in there:
            model = view.models[number]
            may_go_ns = (
                model.loaded_ns + round(self.hysteresis_s * 1e9)
                if model.live
                else model.used_ns + round(self.keep_alive_s * 1e9)
            )
            if may_go_ns > view.now_ns:
                later.append(may_go_ns)
            elif model.live:
                busy.append(Candidate(number, model.image_pages, model.loaded_ns, model.load_ns))
            else:
                free_to_go.append(Candidate(number, model.image_pages, model.used_ns, model.load_ns))
        leaving = victims(free_to_go, needed_pages, self.eviction, view.now_ns)
        if leaving is None:
            idle_pages = sum(one.pages for one in free_to_go)
            more = victims(busy, needed_pages - idle_pages, self.eviction, view.now_ns)
            leaving = None if more is None else [one.key for one in free_to_go] + more
        return leaving, min(later, default=None)

    def _prefetched(self, view: DeviceView, absent: Sequence[int]) -> int | None:
        """What fits without anyone leaving."""
        if not self.prefetch:
            return None
        fitting = [number for number in absent if view.models[number].image_pages <= view.free_pages]
        if not fitting:
            return None
        rank = {number: place for place, number in enumerate(self.popularity)}
        return min(fitting, key=lambda n: (-view.models[n].used_ns, rank.get(n, len(rank)), n))
