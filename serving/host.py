"""The host side that every system shares: workers started and watched, requests admitted, events collected.

A system decides where things lie (`plan`) and how its workers are laid out (`_launch`); admission, dispatch, failure and
clean-up are the same for all, so that a comparison compares placements and policies and nothing else.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from serving.admission import AdmissionLimits, AdmissionQueue, most_free
from serving.backend import Backend, RealBackend, Worker
from serving.errors import UserError
from serving.interface import (
    SWITCH_PARTS,
    Device,
    DeviceStats,
    Event,
    EventKind,
    Placement,
    PoolSample,
    Request,
    ServedModel,
)
from serving.memory.kv_pool import KVGeometry
from serving.options import EngineOptions
from serving.shm.region import SharedRegion
from serving.workers.config import Bells, ModelWorkerConfig, PoolConfig, Role
from serving.workers.messages import Cancel, Expired, Preempted, Submit, Tokens

START_TIMEOUT_S = 600.0


@dataclass
class _Pool:
    """A KV pool as the host knows it: its admission queue, and the worker that serves it, which knows the pool's models by
    numbers."""

    name: str
    worker: Worker
    device: Device
    queue: AdmissionQueue
    index_of_model: dict[str, int]


@dataclass
class _Live:
    """A request between submission and its end."""

    request: Request
    pool: _Pool
    since_ns: int
    admitted: bool = False
    cancelled: bool = False


class HostedSystem:
    """Base of systems that run on worker processes. Subclasses set `name`, implement `plan` and `_launch`."""

    name: str

    def __init__(self, timeline_dir: str = "") -> None:
        self._timeline_dir = Path(timeline_dir).absolute() if timeline_dir else None
        self._backend: Backend = RealBackend()
        self._clock = self._backend.clock
        self._workers: list[tuple[Worker, Device]] = []
        self._mailbox_regions: list[SharedRegion] = []
        self._bells: list[Bells] = []
        self._pools: list[_Pool] = []
        self._pool_limits: dict[str, AdmissionLimits] = {}  # by the pool's name
        self._pools_of_model: dict[str, list[_Pool]] = {}  # several where replicas of a model serve it
        self._models: dict[str, ServedModel] = {}
        self._live: dict[int, _Live] = {}
        self._promised_output_tokens: dict[str, int] | None = (
            None  # by model, where admission promises less than the cap
        )
        self._events: list[Event] = []
        self._samples: list[PoolSample] = []
        self._started_ns = 0

    # -- for subclasses ------------------------------------------------------------------------------------------------
    def _launch(self, placement: Placement) -> None:
        """Start the workers with `_start_worker` and register the KV pools with `_register_pools`."""
        raise NotImplementedError

    def _choose(self, pools: Sequence[_Pool], request: Request) -> _Pool:
        """Which of the pools of its model takes `request`."""
        tokens = len(request.prompt) + request.max_new_tokens
        return pools[most_free([pool.queue for pool in pools], request.model, tokens)]

    def _start_worker(self, device: Device, role: Role, inherited_fds: Sequence[int] = (), engine: str = "") -> Worker:
        """Start a worker on `device`; `engine` tells it from others there."""
        file = f"{device.name.replace(':', '-')}{'-' + engine if engine else ''}.npy"
        timeline = self._timeline_dir / file if self._timeline_dir else None
        name = f"{self.name}/{device.name}{'/' + engine if engine else ''}"
        worker = self._backend.start_worker(name, core_of(device), role, inherited_fds, timeline)
        self._workers.append((worker, device))
        return worker

    def _new_mailbox_region(self, size_bytes: int) -> SharedRegion:
        region = SharedRegion(size_bytes)
        self._mailbox_regions.append(region)
        return region

    def _new_bells(self) -> Bells:
        bells = Bells.new()
        self._bells.append(bells)
        return bells

    def _register_pools(
        self,
        worker: Worker,
        role: ModelWorkerConfig,
        options: EngineOptions,
        rule: str = "",
        queue: AdmissionQueue | None = None,
    ) -> None:
        for config in role.pools:
            hosted = {index: role.models[index] for index in config.models}
            geometries = [KVGeometry.of(model.spec, model.dtype) for model in hosted.values()]
            numbers = {model.name: index for index, model in hosted.items()}
            self._register_pool(worker, role.device, config, geometries, numbers, options, rule, queue)

    def _register_pool(
        self,
        worker: Worker,
        device: Device,
        config: PoolConfig,
        geometries: Sequence[KVGeometry],
        index_of_model: dict[str, int],
        options: EngineOptions,
        rule: str = "",
        queue: AdmissionQueue | None = None,
    ) -> None:
        """Let requests of the models in `index_of_model` into a pool; of several pools of a model, the emptiest takes one.
        `rule` is of admission; with `queue` that one admits, which pools of several engines may share."""
        limits = AdmissionLimits(
            budget_pages=config.num_pages,
            page_bytes=config.page_bytes,
            max_running=config.max_runs,
            max_queued=options.max_queued,
            rule=rule or ("cap" if self._promised_output_tokens is None else "quantile"),
            deadline_s=options.queue_deadline_s,
            promised_output_tokens=self._promised_output_tokens or {},
        )
        pool = _Pool(config.name, worker, device, queue or AdmissionQueue(limits, geometries), index_of_model)
        self._pools.append(pool)
        self._pool_limits[pool.name] = pool.queue.limits
        for name in index_of_model:
            self._pools_of_model.setdefault(name, []).append(pool)

    # -- the one interface ---------------------------------------------------------------------------------------------
    def start(self, placement: Placement, backend: Backend | None = None) -> None:
        """Start all workers on `backend` (real by default) and wait until each has loaded. On any failure everything is
        stopped and the cause raised."""
        if self._workers:
            raise UserError(f"{self.name} is running already")
        self._backend = backend or RealBackend()
        self._clock = self._backend.clock
        self._models = {model.name: model for model in placement.models}
        if self._timeline_dir:
            self._timeline_dir.mkdir(parents=True, exist_ok=True)
        try:
            self._launch(placement)
            deadline_s = time.monotonic() + START_TIMEOUT_S
            for worker, _ in self._workers:
                worker.wait_ready(deadline_s)
        except BaseException:
            self.stop()
            raise
        self._started_ns = self._clock.now_ns()

    def submit(self, request: Request) -> None:
        """Take a request. A request that can never be served gets its REJECTED event at the next poll."""
        if request.request_id in self._live:
            raise UserError(f"request id {request.request_id} is in use")
        problem = self._problem_with(request)
        if not problem:
            pools = self._pools_of_model[request.model]
            pool = self._choose(pools, request)
            problem = pool.queue.offer(
                request.request_id,
                request.model,
                len(request.prompt),
                request.max_new_tokens,
                self._clock.now_ns() / 1e9,
            )
        if problem:
            self._emit(request.request_id, EventKind.REJECTED, self._clock.now_ns(), reason=problem)
            return
        self._live[request.request_id] = _Live(request, pool, self._clock.now_ns())
        self._admit(pool)

    def cancel(self, request_id: int) -> bool:
        """End a request early: at once while it waits, with its next token once its worker has it, so that pages go back
        as at any other end. False where no such request is live."""
        live = self._live.get(request_id)
        if live is None:
            return False
        if live.pool.queue.withdraw(request_id):
            del self._live[request_id]
            self._emit(request_id, EventKind.CANCELLED, self._clock.now_ns())
            self._admit(live.pool)  # it may have been the one that others waited behind
        elif not live.cancelled:
            live.cancelled = True
            live.pool.worker.send(Cancel(request_id, live.pool.index_of_model[live.request.model]))
        return True

    def poll(self) -> list[Event]:
        """Events since the last call. Raises WorkerDied when a worker has ended; what it reported before is kept."""
        ended = False
        for worker, device in self._workers:
            for message in worker.receive():
                if isinstance(message, Tokens):
                    ended |= self._take_tokens(message)
                elif isinstance(message, Expired):
                    ended = True
                    self._take_expired(message)
                elif isinstance(message, Preempted):
                    for request_id in message.request_ids:
                        self._emit(request_id, EventKind.PREEMPTED, message.time_ns, reason="another needed its KV")
                else:
                    self._take_sample(device, message)
        for pool in self._pools:
            for request_id in pool.queue.expire(self._clock.now_ns() / 1e9):
                del self._live[request_id]
                reason = f"waited longer than {pool.queue.limits.deadline_s} s for KV"
                self._emit(request_id, EventKind.REJECTED, self._clock.now_ns(), reason=reason)
            if ended:
                self._admit(pool)
        events, self._events = self._events, []
        if not events:
            for worker, _ in self._workers:
                worker.check()
        return events

    def pool_samples(self) -> list[PoolSample]:
        samples, self._samples = self._samples, []
        return samples

    def stats(self) -> list[DeviceStats]:
        elapsed_ns = self._clock.now_ns() - self._started_ns
        totals: dict[str, Counter] = {}  # of all workers of a device
        for worker, device in self._workers:
            totals.setdefault(device.name, Counter()).update(worker.read_counters())
        return [
            DeviceStats(
                name,
                counted["busy_ns"],
                elapsed_ns,
                counted["bytes_crossed"],
                counted["steps"],
                counted["preemptions"],
                swaps=counted["swaps"],
                switch_ns={part: counted[f"switch_{part}_ns"] for part in SWITCH_PARTS} if counted["swaps"] else {},
            )
            for name, counted in totals.items()
        ]

    def notes(self) -> dict[str, object]:
        """Nothing, unless a system has something to say."""
        return {}

    def stop(self) -> None:
        """Stop every worker and give back all shared memory. Safe at any time, and twice."""
        workers, self._workers = self._workers, []
        regions, self._mailbox_regions = self._mailbox_regions, []
        for worker, _ in workers:
            worker.stop()
        for region in regions:
            region.close()
        while self._bells:
            for doorbell in self._bells.pop().doorbells:
                doorbell.close()
        self._pools.clear()
        self._pool_limits.clear()
        self._pools_of_model.clear()
        self._live.clear()

    # -- inside --------------------------------------------------------------------------------------------------------
    def _problem_with(self, request: Request) -> str:
        model = self._models.get(request.model)
        if model is None:
            return f"unknown model {request.model!r}; served: {', '.join(self._models)}"
        if not request.prompt or request.max_new_tokens < 1:
            return "a request needs at least one prompt token and one token to generate"
        if not 0 <= min(request.prompt) <= max(request.prompt) < model.spec.vocab_size:
            return f"prompt ids must lie in [0, {model.spec.vocab_size}) for {request.model}"
        return ""

    def _admit(self, pool: _Pool) -> None:
        for request_id in pool.queue.admit(self._clock.now_ns() / 1e9):
            self._dispatch(request_id)

    def _dispatch(self, request_id: int) -> None:
        """Send an admitted request to its worker."""
        live = self._live[request_id]
        live.admitted = True
        self._emit(request_id, EventKind.ADMITTED, self._clock.now_ns())
        request, pool = live.request, live.pool
        stop_ids = () if request.ignore_eos else self._models[request.model].spec.eos_token_ids
        index = pool.index_of_model[request.model]
        pool.worker.send(Submit(request_id, index, request.prompt, request.max_new_tokens, stop_ids, live.since_ns))

    def _take_tokens(self, message: Tokens) -> bool:
        ended, time_ns = False, message.time_ns
        for request_id, token, last in message.items:
            self._events.append(Event(request_id, EventKind.TOKENS, time_ns, (token,)))
            if last:
                live = self._live.pop(request_id)
                live.pool.queue.finish(request_id)
                kind = EventKind.CANCELLED if live.cancelled else EventKind.COMPLETED
                self._emit(request_id, kind, time_ns)
                ended = True
        return ended

    def _take_expired(self, message: Expired) -> None:
        for request_id in message.request_ids:
            live = self._live.pop(request_id)
            live.pool.queue.finish(request_id)
            reason = f"waited longer than {live.pool.queue.limits.deadline_s} s for its device"
            if live.cancelled:
                self._emit(request_id, EventKind.CANCELLED, message.time_ns)
            else:
                self._emit(request_id, EventKind.REJECTED, message.time_ns, reason=reason)

    def _take_sample(self, device: Device, message) -> None:
        for name, pages in message.pages:
            limits = self._pool_limits[name]
            self._samples.append(
                PoolSample(message.time_ns, f"{device.name}/{name}", pages, limits.budget_pages, limits.page_bytes)
            )

    def _emit(
        self, request_id: int, kind: EventKind, time_ns: int, tokens: tuple[int, ...] = (), reason: str = ""
    ) -> None:
        self._events.append(Event(request_id, kind, time_ns, tokens, reason))


def core_of(device: Device) -> int | None:
    """The core that stands for a CPU device, among those this process may use; None for other kinds of device. Devices
    beyond the cores share them from the first on: right for a test, not for timing, so the runner refuses it unless asked."""
    if device.kind != "cpu":
        return None
    cores = sorted(os.sched_getaffinity(0))
    return cores[device.index % len(cores)]


def pool_config(name: str, kv_bytes: int, page_bytes: int, models: Sequence[int], max_running: int) -> PoolConfig:
    """A pool of as many whole pages as `kv_bytes` holds."""
    return PoolConfig(name, kv_bytes // page_bytes, page_bytes, tuple(models), max_running)
