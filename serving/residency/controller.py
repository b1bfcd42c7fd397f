"""Who is resident, who is seated and who may step on a device whose models come and go. Pure state: no clock, no tensor.

A worker, real or simulated, tells what happened and when, and carries out what it is told: evictions, loads, KV to host
memory and back. What is decided is the policy's; what is kept here is that no page is promised twice, that nothing leaves
within a step, and where the time of a switch went.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from serving.interface import SWITCH_PARTS
from serving.residency.policy import Decision, DeviceView, ModelView, SwapPolicy
from serving.scheduler import StepPlan
from serving.sequence import Sequence as LiveSequence

_KEPT = 0.75  # of an estimate, when a new measurement comes


class Evict(NamedTuple):
    """Take the model's weights off the device."""

    model: int


class Load(NamedTuple):
    """Begin to copy the model's weights to the device."""

    model: int


class Save(NamedTuple):
    """Move the sequence's KV to host memory."""

    sequence: LiveSequence


class Restore(NamedTuple):
    """Move the sequence's KV back."""

    sequence: LiveSequence


class Expire(NamedTuple):
    """Let go of the sequence, of which nothing was computed: it waited for too long."""

    sequence: LiveSequence


Action = Evict | Load | Save | Restore | Expire


@dataclass(frozen=True)
class Facts:
    """What a controller must know of one model: pages of its image in the arena, bytes of KV a token, expected load time."""

    image_pages: int
    kv_token_bytes: int
    load_ns: int


@dataclass(slots=True)
class _State:
    resident: bool = False
    in_flight: int = 0  # steps
    used_ns: int = 0
    loaded_ns: int = 0
    step_ns: int = 0
    load_ns: int = 0
    wanted_ns: int | None = None  # since when a sequence waits for weights that are absent
    warming: bool = False  # loaded for somebody who waits, and no step has ended yet


@dataclass
class SwitchTimes:
    """Loads that ended, and where their time went, in nanoseconds by part."""

    swaps: int = 0
    by_part: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SWITCH_PARTS, 0))


class SwapController:
    """Weights and KV of `facts`, by number, in an arena of `arena_pages` and a pool of `kv_pages`, with `host_kv_bytes` of host
    memory for KV that had to give way. `pages_of(model, tokens)` counts KV pages."""

    def __init__(
        self,
        facts: Sequence[Facts],
        arena_pages: int,
        kv_pages: int,
        host_kv_bytes: int,
        pages_of: Callable[[int, int], int],
        policy: SwapPolicy,
        deadline_ns: int = 0,
    ) -> None:
        """Sequences of which nothing was computed `deadline_ns` after they were submitted are let go; 0: never."""
        self._facts, self._policy, self._pages_of = facts, policy, pages_of
        self.free_pages, self.free_kv_pages, self.free_host_bytes = arena_pages, kv_pages, host_kv_bytes
        self.models = [_State(load_ns=fact.load_ns) for fact in facts]
        self.units = [0] * len(facts)  # of each model that are there; whoever loads counts them up
        self.times = SwitchTimes()
        self.loading: int | None = None
        self._arrivals: dict[LiveSequence, int] = {}  # live sequences in order of arrival
        self._live: list[dict[LiveSequence, None]] = [{} for _ in facts]  # the same by model
        self._views: list[ModelView | None] = [None] * len(facts)  # None: to be made anew
        self._stepping: set[int] = set()  # models with steps in flight
        self._seats: dict[LiveSequence, int] = {}  # pages promised to those that compute
        self._saved: dict[LiveSequence, int] = {}  # host bytes of those that gave way
        self._decision = Decision((), ())
        self._dirty = True
        self._deadline_ns = deadline_ns
        self._expires_ns: int | None = None  # the first of those that wait

    # -- what happened -------------------------------------------------------------------------------------------------
    def add(self, sequence: LiveSequence, now_ns: int) -> None:
        self._arrivals[sequence] = sequence.since_ns or now_ns
        self._live[sequence.model][sequence] = None
        self._views[sequence.model] = None
        state = self.models[sequence.model]
        if not state.resident and state.wanted_ns is None and self.loading != sequence.model:
            state.wanted_ns = now_ns
        self._dirty = True

    def began(self, plan: StepPlan) -> None:
        self.models[plan.model].in_flight += 1
        self._stepping.add(plan.model)

    def ended(self, plan: StepPlan, ended: Sequence[LiveSequence], now_ns: int, took_ns: int) -> None:
        """A step is over, and with it the sequences that `ended`; `took_ns` counts for later decode steps where it was one."""
        state = self.models[plan.model]
        state.in_flight -= 1
        if not state.in_flight:
            self._stepping.discard(plan.model)
        state.used_ns = now_ns
        self._views[plan.model] = None
        for sequence in ended:
            self._forget(sequence)
            self.free_kv_pages += self._seats.pop(sequence)
        if all(rows == 1 for _, rows in plan.items) and not state.warming:
            state.step_ns = _mean(state.step_ns, took_ns)
        if state.warming and state.resident:
            state.warming = False
            self.times.by_part["warm_up"] += now_ns - state.loaded_ns
        self._dirty |= bool(ended) or not self._decision.settled

    def loaded(self, model: int, now_ns: int, weights_ns: int, checkpoint_ns: int = 0) -> None:
        """The last unit of `model` is there. Of its time `weights_ns` went into copying, `checkpoint_ns` into the host cache."""
        state = self.models[model]
        state.resident, state.loaded_ns = True, now_ns
        self._views[model] = None
        state.load_ns = _mean(state.load_ns, weights_ns)
        self.times.swaps += 1
        self.times.by_part["weights"] += weights_ns
        self.times.by_part["checkpoint"] += checkpoint_ns
        self.loading = None
        self._dirty = True

    def spent(self, part: str, took_ns: int) -> None:
        """An eviction or a move of KV took so long."""
        self.times.by_part[part] += took_ns

    def start_resident(self, model: int, units: int) -> None:
        """`model` is there from the start, which is no swap."""
        self.free_pages -= self._facts[model].image_pages
        state = self.models[model]
        state.resident, self.units[model] = True, units
        self._views[model] = None

    # -- what to do ----------------------------------------------------------------------------------------------------
    def actions(self, now_ns: int) -> list[Action]:
        """What is to be carried out now, in order. Empty where nothing has happened since."""
        if self.rests(now_ns):
            return []
        self._dirty = False
        expired = self._expire(now_ns)
        self._decision = decision = self._policy.decide(self.view(now_ns))
        actions = expired + self._swap(decision, now_ns) + self._seat(decision)
        if self._deadline_ns:
            expiring = (since_ns for one, since_ns in self._arrivals.items() if self._waits(one))
            self._expires_ns = min(expiring, default=None)
            if self._expires_ns is not None:
                self._expires_ns += self._deadline_ns + 1
        return actions

    def rests(self, now_ns: int) -> bool:
        """Whether there is nothing to be carried out now."""
        again_ns = self.again_ns
        return not self._dirty and (again_ns is None or now_ns < again_ns)

    def goes_on(self, now_ns: int) -> bool:
        """Whether there will be nothing to be carried out once a step that ends no sequence has ended now."""
        return self._decision.settled and self.rests(now_ns)

    @property
    def again_ns(self) -> int | None:
        """When to look for actions though nothing happens."""
        again_ns = self._decision.again_ns
        if again_ns is None or self._expires_ns is None:
            return self._expires_ns if again_ns is None else again_ns
        return min(again_ns, self._expires_ns)

    def may_step(self) -> Callable[[LiveSequence], bool]:
        """Who may take part in the next step: seated, of a model that may step and is in none. Of resident models one steps at
        a time; a loading one may be on its way beside it."""
        states, seats = self.models, self._seats
        busy = any(states[model].resident for model in self._stepping)
        open_to = {
            model
            for model in self._decision.step
            if self.units[model] and not states[model].in_flight and not (states[model].resident and busy)
        }
        return lambda sequence: sequence.model in open_to and sequence in seats

    def view(self, now_ns: int) -> DeviceView:
        """The device as a policy sees it."""
        for model, view in enumerate(self._views):
            if view is None:
                self._views[model] = self._view(model)
        return DeviceView(now_ns, tuple(self._views), self.free_pages, self.loading is not None)

    def _view(self, model: int) -> ModelView:
        state, fact, live = self.models[model], self._facts[model], list(self._live[model])
        prompts = [sequence for sequence in live if sequence.cached < sequence.prompt_tokens]
        return ModelView(
            image_pages=fact.image_pages,
            resident=state.resident,
            loading=self.loading == model,
            live=len(live),
            seated=sum(sequence in self._seats for sequence in live),
            prompts=len(prompts),
            oldest_ns=self._arrivals[live[0]] if live else None,
            oldest_prompt_ns=self._arrivals[prompts[0]] if prompts else None,
            used_ns=state.used_ns,
            loaded_ns=state.loaded_ns,
            step_ns=state.step_ns,
            load_ns=state.load_ns,
        )

    def _forget(self, sequence: LiveSequence) -> None:
        del self._arrivals[sequence], self._live[sequence.model][sequence]
        self._views[sequence.model] = None

    def _waits(self, sequence: LiveSequence) -> bool:
        """Whether nothing of it was computed, and it has no seat for that."""
        return not sequence.cached and sequence not in self._seats

    def _expire(self, now_ns: int) -> list[Action]:
        if not self._deadline_ns:
            return []
        since = self._arrivals
        late = [one for one in since if self._waits(one) and now_ns - since[one] > self._deadline_ns]
        for sequence in late:
            self._forget(sequence)
        for sequence in late:
            if not self._live[sequence.model]:
                state = self.models[sequence.model]
                state.wanted_ns, state.warming = None, False
        return [Expire(sequence) for sequence in late]

    def _swap(self, decision: Decision, now_ns: int) -> list[Action]:
        model = decision.load
        if model is None or self.loading is not None or any(self.models[gone].in_flight for gone in decision.evict):
            return []
        for gone in decision.evict:
            self.models[gone].resident, self.units[gone] = False, 0
            self._views[gone] = None
            self.free_pages += self._facts[gone].image_pages
        self.free_pages -= self._facts[model].image_pages
        if self.free_pages < 0:
            raise ValueError(f"model {model} was to be loaded into an arena that lacks {-self.free_pages} pages")
        for sequence in self._arrivals:
            gone = self.models[sequence.model]
            if sequence.model in decision.evict and gone.wanted_ns is None:
                gone.wanted_ns = now_ns
        state = self.models[model]
        if state.wanted_ns is not None:
            self.times.by_part["queue"] += now_ns - state.wanted_ns
            state.wanted_ns = None
            state.warming = True
        self.loading = model
        self._views[model] = None
        return [*(Evict(gone) for gone in decision.evict), Load(model)]

    def _seat(self, decision: Decision) -> list[Action]:
        """Seats for the oldest that may have one; none overtakes one that waits for pages."""
        actions: list[Action] = []
        for sequence in self._arrivals:
            if sequence in self._seats or sequence.model not in decision.seat:
                continue
            needed = self._pages_of(sequence.model, sequence.most_cached)
            saves = self._make_room(needed, decision.give_way)
            if saves is None:
                break
            actions += saves
            self.free_kv_pages -= needed
            self._seats[sequence] = needed
            self._views[sequence.model] = None
            if sequence in self._saved:
                self.free_host_bytes += self._saved.pop(sequence)
                actions.append(Restore(sequence))
        return actions

    def _make_room(self, needed: int, give_way: Sequence[int]) -> list[Action] | None:
        """Whose KV goes to host memory so that `needed` pages are free; None, changing nothing, where that is not enough."""
        saves: list[LiveSequence] = []
        free, host = self.free_kv_pages, self.free_host_bytes
        for model in give_way:
            if free >= needed:
                break
            if self.models[model].in_flight:
                continue
            for sequence in reversed([one for one in self._seats if one.model == model]):
                held_bytes = sequence.cached * self._facts[model].kv_token_bytes
                if free >= needed or held_bytes > host:
                    break
                free, host = free + self._seats[sequence], host - held_bytes
                saves.append(sequence)
        if free < needed:
            return None
        for sequence in saves:
            self.free_kv_pages += self._seats.pop(sequence)
            self._views[sequence.model] = None
            held_bytes = sequence.cached * self._facts[sequence.model].kv_token_bytes
            if held_bytes:
                self._saved[sequence] = held_bytes
                self.free_host_bytes -= held_bytes
        return [Save(sequence) for sequence in saves if sequence in self._saved]


def _mean(before: int, measured: int) -> int:
    return round(_KEPT * before + (1 - _KEPT) * measured) if before else measured
