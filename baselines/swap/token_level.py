"""Swapping between tokens (Aegaeon): models take turns, weighted by what each needs to keep its tokens on time.

A turn is one model's: it runs the prompts that have come for it, grouped, first come first served, or it decodes for its quota
(:mod:`baselines.swap.quota`). Prompts have precedence every other turn. The weights of the next turn's model come while this
one computes; who leaves the device is whose turn is farthest. KV stays until somebody in turn needs its pages. While the
model in turn still loads, resident ones go on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from baselines.swap.quota import quotas_s
from serving.residency.eviction import Candidate, victims
from serving.residency.policy import Decision, DeviceView


@dataclass
class _Turn:
    model: int
    prompts_before_ns: int | None = None  # prompts that came no later are run in it; None: it decodes
    started_ns: int | None = None  # when its model was there, with KV
    quota_ns: int = 0
    offered: bool = False  # its model was there and nobody of it had KV: it was offered seats


@dataclass
class TokenLevel:
    """Turns of one device. It remembers whose turn it is and the order of the round, nothing else."""

    tbt_target_s: float = 0.1
    max_quota_s: float = 4.0
    eviction: str = "lru"
    prefetch: bool = True
    popularity: tuple[int, ...] = ()
    _turn: _Turn | None = None
    _round: list[int] = field(default_factory=list)  # models with work, the next turn's first

    def decide(self, view: DeviceView) -> Decision:
        self._update_round(view)
        if self._turn is not None and self._is_stuck(view):
            self._turn = self._next_turn(view, [n for n in self._round if view.models[n].seated])
        elif self._turn is None or self._over(view):
            self._turn = self._next_turn(view, self._round)
        turn = self._turn
        there = [number for number, model in enumerate(view.models) if not model.absent]
        if turn is None:
            return Decision((), (), load=self._unasked(view))
        current = view.models[turn.model]
        if current.resident and current.seated and turn.started_ns is None:
            turn.started_ns = view.now_ns
        others = [] if current.resident and current.seated else [number for number in there if number != turn.model]
        order = [turn.model, *(number for number in self._round if number != turn.model)]
        load, evict = self._load(view, order)
        staying = [number for number in others if number not in evict]
        step = ([turn.model] if not current.absent else []) + staying
        again_ns = None if turn.started_ns is None or turn.prompts_before_ns is not None else self._ends_ns(turn)
        if current.resident and not current.seated and not turn.offered:
            turn.offered, again_ns = True, view.now_ns + 1  # to see what came of the offer
        return Decision(
            step=tuple(step),
            seat=(turn.model,),
            load=load,
            evict=evict,
            give_way=tuple(reversed(order[1:])),
            again_ns=again_ns,
        )

    # -- turns ---------------------------------------------------------------------------------------------------------
    def _update_round(self, view: DeviceView) -> None:
        self._round = [number for number in self._round if view.models[number].live]
        self._round += [n for n, model in enumerate(view.models) if model.live and n not in self._round]

    def _over(self, view: DeviceView) -> bool:
        turn = self._turn
        model = view.models[turn.model]
        if not model.live:
            return True
        if turn.started_ns is None:
            return False
        if turn.prompts_before_ns is not None:
            oldest = model.oldest_prompt_ns
            return oldest is None or oldest > turn.prompts_before_ns or not model.seated
        return view.now_ns >= self._ends_ns(turn) or not model.seated

    def _is_stuck(self, view: DeviceView) -> bool:
        """Whether the model in turn was offered seats and had none, and whoever holds the KV has no weights here to end with:
        host memory for KV is full. Then the turn goes to one that holds KV, else all would wait for ever."""
        current = view.models[self._turn.model]
        if not (self._turn.offered and current.resident and current.live and not current.seated):
            return False
        holding = [model for model in view.models if model.seated]
        return bool(holding) and all(model.absent for model in holding)

    def _ends_ns(self, turn: _Turn) -> int:
        return turn.started_ns + turn.quota_ns

    def _next_turn(self, view: DeviceView, among: Sequence[int]) -> _Turn | None:
        if not among:
            return None
        prompts = [n for n in among if view.models[n].prompts]
        decoding = [n for n in among if view.models[n].prompts < view.models[n].live]
        after_prompts = self._turn is not None and self._turn.prompts_before_ns is not None
        if prompts and not (after_prompts and decoding):
            first = min(prompts, key=lambda n: (view.models[n].oldest_prompt_ns, n))
            return _Turn(first, prompts_before_ns=view.now_ns)
        number = decoding[0]
        self._round.remove(number)
        self._round.append(number)
        return _Turn(number, quota_ns=self._quota_ns(view, number, decoding))

    def _quota_ns(self, view: DeviceView, number: int, decoding: Sequence[int]) -> int:
        models = [view.models[n] for n in decoding]
        step_s = [(model.step_ns or self.tbt_target_s * 5e8) / 1e9 for model in models]
        switch_s = sum(model.load_ns for model in models if not model.resident) / 1e9
        turns = quotas_s(step_s, switch_s, self.tbt_target_s, self.max_quota_s)
        return round(1e9 * turns[list(decoding).index(number)])

    # -- weights -------------------------------------------------------------------------------------------------------
    def _load(self, view: DeviceView, order: Sequence[int]) -> tuple[int | None, tuple[int, ...]]:
        """The first absent model in the order of turns, and who makes room for it: never one whose turn is before it."""
        if view.link_busy:
            return None, ()
        for place, number in enumerate(order[: 2 if self.prefetch else 1]):
            model = view.models[number]
            if not model.absent:
                continue
            kept = set(order[:place])
            soon = {n: at for at, n in enumerate(order)}
            needed = model.image_pages - view.free_pages
            leaving: list[int] = []
            idle = [n for n, other in enumerate(view.models) if other.resident and n not in soon]
            chosen = victims([self._candidate(view, n) for n in idle], needed, self.eviction, view.now_ns)
            if chosen is not None:
                return number, tuple(chosen)
            leaving += idle
            needed -= sum(view.models[n].image_pages for n in idle)
            for other in reversed(order[place + 1 :]):
                if needed <= 0:
                    break
                if view.models[other].resident and other not in kept:
                    leaving.append(other)
                    needed -= view.models[other].image_pages
            return (number, tuple(leaving)) if needed <= 0 else (None, ())
        return None, ()

    def _unasked(self, view: DeviceView) -> int | None:
        """With nothing to do, what fits without anyone leaving, the most popular first."""
        if view.link_busy or not self.prefetch:
            return None
        rank = {number: place for place, number in enumerate(self.popularity)}
        fitting = [n for n, m in enumerate(view.models) if m.absent and m.image_pages <= view.free_pages]
        return min(fitting, key=lambda n: (-view.models[n].used_ns, rank.get(n, len(rank)), n), default=None)

    def _candidate(self, view: DeviceView, number: int) -> Candidate:
        model = view.models[number]
        return Candidate(number, model.image_pages, model.used_ns, model.load_ns)
