"""The worker of a device whose models come and go: what its controller says is carried out between steps.

Two lanes: one for resident models, which take turns, and one for a model that is loading, whose layers run as they come. A
layer waits for its weights as it would for rows from another device, and whoever has its weights computes meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from serving.memory.offload import HostKV
from serving.residency.controller import Action, Evict, Expire, Load, Save, SwapController
from serving.residency.loader import Loaded
from serving.scheduler import StepPlan
from serving.sequence import Sequence
from serving.workers.messages import Expired
from serving.workers.model_worker import InFlight, ModelWorker, Produced
from serving.workers.ports import LocalFFN

LANES = 2
_LOOK_S = 0.0005  # how often a worker that waits for weights looks at its other duties


class SeatedGrowth:
    """The controller as a worker asks who may step: pages are promised with the seat, so nobody pauses within a step."""

    def __init__(self, controller: SwapController) -> None:
        self._controller = controller
        self._ended: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        self._controller.add(sequence, time.monotonic_ns())

    def remove(self, sequence: Sequence) -> None:
        self._ended.append(sequence)

    def take(self, plan: StepPlan) -> None:
        self._controller.began(plan)

    def may_step(self, now_s: float = 0.0) -> Callable[[Sequence], bool]:
        return self._controller.may_step()

    def take_preempted(self) -> list[Sequence]:
        """Nobody: KV that gives way is kept, not computed again."""
        return []

    def ended(self) -> list[Sequence]:
        """Sequences that ended since the last call."""
        ended, self._ended = self._ended, []
        return ended


class GatedFFN(LocalFFN):
    """FFN halves in this process, where a lane goes on once the weights of what comes next are there."""

    def __init__(self, halves, lanes: int, units: list[int]) -> None:
        super().__init__(halves, lanes)
        self._units = units
        self._next: list[tuple[int, int]] = [(0, 0)] * lanes  # model and unit

    def send(self, lane: int, model: int, layer: int, rows) -> None:
        super().send(lane, model, layer, rows)
        self._next[lane] = (model, layer + 1)

    def done(self, lane: int) -> bool:
        model, unit = self._next[lane]
        return self._units[model] > unit


class Arena(Protocol):
    """Where weights lie: a CPU device's or a card's."""

    def evict(self, model: int) -> None: ...


class WeightsLoader(Protocol):
    """What brings weights, and counts units as they come: see :class:`serving.residency.loader.Loader`."""

    busy: bool

    def start(self, model: int) -> None: ...

    def poll(self) -> Loaded | None: ...

    def wait(self, longest_s: float) -> None: ...


class Swapping:
    """What a worker of either kind does beside its steps where models come and go."""

    def __init__(
        self, controller: SwapController, arena: Arena, loader: WeightsLoader, host_kv: HostKV, **base
    ) -> None:
        self._seated = SeatedGrowth(controller)
        super().__init__(lanes=LANES, growth=self._seated, **base)
        self._controller, self._arena, self._loader, self._host_kv = controller, arena, loader, host_kv
        self._begun_ns: dict[int, int] = {}  # by the step's identity

    def _poll(self) -> bool:
        done = self._loader.poll()
        if done is not None:
            self._controller.loaded(done.model, time.monotonic_ns(), done.weights_ns, done.checkpoint_ns)
            self._counters.add("loaded_bytes", done.copied_bytes)
            self._counters.add("cache_misses", int(done.checkpoint_ns > 0))
            self._count()
        return super()._poll() or done is not None

    def _rest(self, idle_spins: int) -> None:
        if self._loader.busy:
            self._loader.wait(_LOOK_S)
        else:
            super()._rest(idle_spins)

    def _begin(self, lane: int) -> bool:
        started_ns = time.monotonic_ns()
        for action in self._controller.actions(started_ns):
            self._carry_out(action)
        if not super()._begin(lane):
            return False
        self._begun_ns[id(self._lanes[lane])] = started_ns
        return True

    def _complete(self, step: InFlight, sampled: list[int]) -> list[Produced]:
        produced = super()._complete(step, sampled)
        now_ns = time.monotonic_ns()
        took_ns = now_ns - self._begun_ns.pop(id(step))
        self._controller.ended(step.plan, self._seated.ended(), now_ns, took_ns)
        self._count()
        return produced

    def _carry_out(self, action: Action) -> None:
        started_ns = time.monotonic_ns()
        if isinstance(action, Load):
            self._loader.start(action.model)
            return
        if isinstance(action, Expire):
            self._let_go(action.sequence)
            return
        if isinstance(action, Evict):
            self._arena.evict(action.model)
            part = "evict"
        else:
            self._move_kv(action.sequence, out=isinstance(action, Save))
            part = "kv"
        took_ns = time.monotonic_ns() - started_ns
        self._controller.spent(part, took_ns)
        self._counters.add("busy_ns", took_ns)

    def _let_go(self, sequence: Sequence) -> None:
        self._scheduler.drop(sequence)
        self._models[sequence.model].kv.close_run(sequence.run)
        self._report(Expired(time.monotonic_ns(), (sequence.request_id,)))

    def _move_kv(self, sequence: Sequence, out: bool) -> None:
        kv = self._models[sequence.model].kv
        if out:
            moved_bytes = self._host_kv.save(sequence.request_id, kv, sequence.run, sequence.cached)
        else:
            moved_bytes = self._host_kv.restore(sequence.request_id, kv, sequence.run)
        self._counters.add("kv_moved_bytes", moved_bytes)

    def _count(self) -> None:
        times = self._controller.times
        self._counters.set("swaps", times.swaps)
        for part, took_ns in times.by_part.items():
            self._counters.set(f"switch_{part}_ns", took_ns)


class SwapWorker(Swapping, ModelWorker):
    """Serves until it is told to stop, as every model worker does."""
