"""A simulated device whose models come and go: the controller of the real one, with loads and moves that take time.

What the host cache lacks is read from its checkpoint first. Weights come over the host link unit by unit while the device
computes, as by a DMA engine; a step of a loading model waits for each layer's weights, and whoever has its weights computes
meanwhile. Evictions and moves of KV occupy the device.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from serving.cost.transfers import LOAD_SHARE, host_copy_s, page_unmap_s
from serving.interface import ServedModel
from serving.memory.kv_pool import KVGeometry
from serving.residency.controller import Evict, Expire, Load, Save
from serving.residency.image import image_bytes
from serving.scheduler import StepPlan, StepScheduler
from serving.sequence import Sequence as LiveSequence
from serving.sim.clock import VirtualClock
from serving.sim.costs import ALONE, StageTimes
from serving.sim.host_cache import SimulatedHostCache
from serving.sim.neighbours import Neighbour
from serving.sim.workers import SIMULATED_TOKEN, SimulatedWorker
from serving.workers.build_swap import controller_of
from serving.workers.config import SwapWorkerConfig
from serving.workers.messages import Cancel, Expired, PoolUse, Stop, Submit, Tokens


@dataclass(slots=True)
class _Lane:
    """A step under way, which needs the weights of one unit of its model after the other: `at` is the next. Each but the last
    takes `attention_ns` beside its FFN; `ffns_ns` are nanoseconds of all FFNs before each, `first_ns` and `last_ns` of what
    comes before and after all layers. All of it is to be taken times `factor`; `passes` are rows of each pass through the FFNs."""

    plan: StepPlan
    wanted: int
    started_ns: int
    attention_ns: int
    ffns_ns: Sequence[int]
    first_ns: int
    last_ns: int
    factor: float
    passes: tuple[int, ...]
    at: int = 0

    @property
    def units(self) -> int:
        return len(self.ffns_ns)

    def run(self, until: int) -> int:
        """Go on to unit `until`; the nanoseconds that this takes alone."""
        begins, self.at = self.at, until
        layers = min(until, self.units - 1)
        took_ns = (layers - begins) * self.attention_ns + self.ffns_ns[layers] - self.ffns_ns[begins]
        took_ns += self.first_ns * (begins == 0) + self.last_ns * (until == self.units)
        return round(took_ns * self.factor)


@dataclass(slots=True)
class _Repeats:
    """Decode steps of the one lane, each the one before, one token on, as long as nothing else happens on the device. `left`
    more will follow the one under way; `done` are over and not yet written into the sequences."""

    left: int
    told: tuple[tuple[int, int, bool], ...]  # what each tells the host
    batch: int
    context: int  # tokens of all sequences
    done: int = 0


class SimulatedSwapWorker(SimulatedWorker):
    """Two lanes, as the real worker has: one of resident models, one of the model that loads."""

    def __init__(
        self,
        name: str,
        clock: VirtualClock,
        role: SwapWorkerConfig,
        times: list[StageTimes],
        host_cache: SimulatedHostCache,
        core: Neighbour,
        prefill: bool = True,
    ) -> None:
        super().__init__(name, clock)
        self._role, self._times, self._prefill = role, times, prefill
        self._random = random.Random(name)
        self._core = core
        self._host_cache = host_cache
        host_cache.prime(role.primed, role.resident)
        self._hardware = times[0].stages.hardware
        rate = role.link_gbps * 1e9 if role.link_gbps else LOAD_SHARE * self._hardware.host_bandwidth
        self._bytes_per_s = rate
        self._controller = controller_of(role, rate)
        self._scheduler = StepScheduler(len(role.models), role.limits)
        self._geometries = [KVGeometry.of(model.spec, model.dtype) for model in role.models]
        self._units = [unit_bytes(model) for model in role.models]
        self._lanes: list[_Lane] = []
        self._repeats: _Repeats | None = None
        self._ffns_ns = functools.lru_cache(maxsize=None)(self._ffns_before_ns)
        self._held: dict[LiveSequence, int] = {}  # pages of those whose KV is here
        self._next_sample_ns = self._timer_ns = 0
        self._counters |= {"loaded_bytes": 0, "kv_moved_bytes": 0, "cache_misses": 0}

    def send(self, message: Submit | Cancel | Stop) -> None:
        self._end_repeats()
        if isinstance(message, Cancel):
            self._scheduler.cancel(message.request_id, message.model)
        if not isinstance(message, Submit):
            return
        prompt = list(message.prompt)
        sequence = LiveSequence(message.request_id, message.model, prompt, len(prompt), message.max_new_tokens)
        sequence.since_ns = message.since_ns
        if not self._prefill:
            sequence.cached = len(prompt) - 1
        self._scheduler.add(sequence)
        self._controller.add(sequence, self._clock.now_ns())
        self._clock.after(0.0, self._wake)

    def read_counters(self) -> dict[str, int]:
        times = self._controller.times
        parts = {f"switch_{part}_ns": took_ns for part, took_ns in times.by_part.items()}
        return {**self._counters, "swaps": times.swaps, **parts}

    # -- what happens next ---------------------------------------------------------------------------------------------
    def _wake(self) -> None:
        if self._busy:
            return
        moved_s = self._carry_out()
        if moved_s:
            self._occupy(moved_s, lambda: None)
            return
        while self._begin():
            pass
        self._go_on()
        self._set_timer(self._clock.now_ns())

    def _set_timer(self, now_ns: int) -> None:
        again_ns = self._controller.again_ns
        if again_ns is not None and again_ns > now_ns and not now_ns < self._timer_ns <= again_ns:
            self._timer_ns = again_ns
            self._clock.after((again_ns - now_ns) / 1e9, self._wake)

    def _carry_out(self) -> float:
        """Seconds that evictions and moves of KV take the device."""
        total_s = 0.0
        for action in self._controller.actions(self._clock.now_ns()):
            if isinstance(action, Load):
                self._load(action.model, total_s)
                continue
            if isinstance(action, Expire):
                self._scheduler.drop(action.sequence)
                self._outbox.append(Expired(self._clock.now_ns(), (action.sequence.request_id,)))
                continue
            if isinstance(action, Evict):
                part, took_s = "evict", page_unmap_s(self._hardware, self._pages_of(action.model))
            else:
                part, took_s = "kv", self._move(action.sequence, isinstance(action, Save))
            self._controller.spent(part, round(took_s * 1e9))
            total_s += took_s
        return total_s

    def _pages_of(self, model: int) -> int:
        return -(-sum(self._units[model]) // self._hardware.page_bytes)

    def _move(self, sequence: LiveSequence, out: bool) -> float:
        geometry = self._geometries[sequence.model]
        moved_bytes = sequence.cached * geometry.token_bytes * geometry.num_layers
        self._counters["kv_moved_bytes"] += moved_bytes
        if out:
            self._held.pop(sequence, None)
        else:
            self._hold(sequence, sequence.cached)
        return host_copy_s(self._hardware, moved_bytes)

    def _load(self, model: int, after_s: float) -> None:
        """Copy the image once the host cache has it, and in `after_s` at the earliest."""
        asked_ns = self._clock.now_ns()

        def copy(read_ns: int) -> None:
            waited_s = (self._clock.now_ns() - asked_ns) / 1e9
            self._counters["cache_misses"] += read_ns > 0
            self._copy(model, max(after_s - waited_s, 0.0), read_ns)

        self._host_cache.acquire(model, copy)

    def _copy(self, model: int, after_s: float, read_ns: int) -> None:
        sizes, copied = self._units[model], 0
        started_s = after_s + len(sizes) * self._hardware.host_latency_s
        for number, size in enumerate(sizes, start=1):
            copied += size
            self._clock.after(started_s + copied / self._bytes_per_s, self._unit_came(model, number, copied, read_ns))

    def _unit_came(self, model: int, count: int, copied: int, read_ns: int) -> Callable[[], None]:
        def came() -> None:
            self._controller.units[model] = count
            if count == len(self._units[model]):
                took_s = copied / self._bytes_per_s + count * self._hardware.host_latency_s
                self._controller.loaded(model, self._clock.now_ns(), round(took_s * 1e9), read_ns)
                self._host_cache.release(model)
                self._counters["loaded_bytes"] += copied
            self._wake()

        return came

    # -- steps ---------------------------------------------------------------------------------------------------------
    def _begin(self) -> bool:
        plan = self._scheduler.next_step(self._controller.may_step())
        if plan is None:
            return False
        self._controller.began(plan)
        self._hold_all(plan)
        times = self._times[plan.model]
        rows, wanted = sum(plan.query_lens), len(plan.logit_rows)
        passes = times.passes(plan.query_lens)
        self._lanes.append(
            _Lane(
                plan,
                wanted,
                self._clock.now_ns(),
                attention_ns=times.attention_ns(plan.query_lens, plan.kv_lens),
                ffns_ns=self._ffns_ns(plan.model, passes),
                first_ns=times.embedding_ns(rows),
                last_ns=times.head_ns(wanted),
                factor=times.factor(self._random),
                passes=passes,
            )
        )
        return True

    def _ffns_before_ns(self, model: int, passes: tuple[int, ...]) -> tuple[int, ...]:
        """Nanoseconds of the FFNs of all layers before each layer, and of all of them."""
        ffn_ns, layers = self._times[model].ffn_ns, self._role.models[model].spec.num_layers
        return (0, *itertools.accumulate(ffn_ns(layer, passes) for layer in range(layers)))

    def _go_on(self) -> None:
        """The first lane that has the weights for it runs: all it has weights for when alone, else a layer."""
        for place, lane in enumerate(self._lanes):
            there = self._controller.units[lane.plan.model]
            if lane.at < there:
                if len(self._lanes) == 1 and not lane.at and there == lane.units:
                    self._repeats = self._repeating(lane)
                took_ns = lane.run(there if len(self._lanes) == 1 else lane.at + 1)
                self._lanes.append(self._lanes.pop(place))
                self._step(lane, took_ns)
                return

    def _step(self, lane: _Lane, alone_ns: int) -> None:
        """Be busy with `lane` for what takes so long alone, and go on from there."""
        beside = self._times[lane.plan.model].whole_beside(lane.passes, lane.attention_ns)
        took_ns = alone_ns
        if beside is not ALONE:
            took_ns = self._core.begin(self._clock.now_ns(), alone_ns, beside)
        self._busy = True
        self._counters["busy_ns"] += took_ns
        self._clock.after(took_ns / 1e9, lambda: self._stepped(lane))

    def _stepped(self, lane: _Lane) -> None:
        self._busy = False
        if self._repeats is not None:
            if self._repeats.left and self._controller.goes_on(self._clock.now_ns()):
                self._repeat(lane, self._repeats)
                return
            self._settle(lane, self._repeats)
        if lane.at == lane.units:
            self._complete(lane)
        self._wake()

    def _complete(self, lane: _Lane) -> None:
        self._lanes.remove(lane)
        produced = self._scheduler.complete(lane.plan, iter([SIMULATED_TOKEN] * lane.wanted))
        ended = [sequence for sequence, _, last in produced if last]
        now_ns = self._clock.now_ns()
        self._controller.ended(lane.plan, ended, now_ns, now_ns - lane.started_ns)
        for sequence in ended:
            self._held.pop(sequence, None)
        self._counters["steps"] += 1
        if produced:
            self._outbox.append(Tokens(now_ns, tuple((s.request_id, token, last) for s, token, last in produced)))
        if ended or now_ns >= self._next_sample_ns:
            self._sample(now_ns)

    # -- steps that repeat ---------------------------------------------------------------------------------------------
    def _repeating(self, lane: _Lane) -> _Repeats | None:
        """How the step of `lane`, the only one, whose weights are all there, repeats itself; None where it does not."""
        plan = lane.plan
        left = self._scheduler.repeats(plan)
        if left < 1:
            return None
        told = tuple((sequence.request_id, SIMULATED_TOKEN, False) for sequence, _ in plan.items)
        return _Repeats(left, told, len(plan.items), sum(plan.kv_lens))

    def _repeat(self, lane: _Lane, repeats: _Repeats) -> None:
        """The step of `lane` is over, and its like begins."""
        now_ns = self._clock.now_ns()
        self._controller.ended(lane.plan, (), now_ns, now_ns - lane.started_ns)
        self._counters["steps"] += 1
        self._outbox.append_tokens(Tokens(now_ns, repeats.told))
        if now_ns >= self._next_sample_ns:
            self._hold_all(lane.plan, repeats.done)
            self._sample(now_ns)
        repeats.left -= 1
        repeats.done += 1
        repeats.context += repeats.batch
        self._controller.began(lane.plan)
        lane.started_ns, lane.at = now_ns, 0
        times = self._times[lane.plan.model]
        lane.attention_ns = times.decode_attention_ns(repeats.batch, repeats.context)
        lane.factor = times.factor(self._random)
        self._step(lane, lane.run(lane.units))
        self._set_timer(now_ns)

    def _end_repeats(self) -> None:
        """Somebody came or goes: what follows the step under way may be another one."""
        if self._repeats is not None:
            self._repeats.left = 0

    def _settle(self, lane: _Lane, repeats: _Repeats) -> None:
        """Write into sequences and plan what the steps that repeated themselves have done."""
        lane.plan = self._scheduler.repeat(lane.plan, repeats.done, SIMULATED_TOKEN)
        self._hold_all(lane.plan)
        self._repeats = None

    def _hold_all(self, plan: StepPlan, further: int = 0) -> None:
        """Pages of what `plan` has in the cache once it is done, and of `further` tokens of each sequence."""
        for (sequence, _), tokens in zip(plan.items, plan.kv_lens, strict=True):
            self._hold(sequence, tokens + further)

    def _hold(self, sequence: LiveSequence, tokens: int) -> None:
        (pool,) = self._role.pools
        pages = self._geometries[sequence.model].pages(tokens, pool.page_bytes)
        self._held[sequence] = max(pages, self._held.get(sequence, 0))

    def _sample(self, now_ns: int) -> None:
        self._next_sample_ns = now_ns + round(self._role.sample_interval_ms * 1e6)
        pages = {model.name: 0 for model in self._role.models}
        for sequence, held in self._held.items():
            pages[self._role.models[sequence.model].name] += held
        (pool,) = self._role.pools
        self._outbox.append(PoolUse(now_ns, ((pool.name, pages),)))


def unit_bytes(model: ServedModel) -> list[int]:
    """Bytes of each unit of a model's image: by its weights, the embedding with the first layer, the head as the last."""
    spec = model.spec
    layer = spec.attention.weight_elements(spec.hidden_size)
    elements = [layer + spec.ffn_layer_elements(number) for number in range(spec.num_layers)]
    elements[0] += spec.vocab_size * spec.hidden_size
    elements.append(spec.vocab_size * spec.hidden_size)
    total, whole = sum(elements), image_bytes(model)
    sizes = [whole * count // total for count in elements]
    sizes[-1] += whole - sum(sizes)
    return sizes
