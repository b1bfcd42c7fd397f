"""Swap: any device serves any model; weights wait in host memory and come to the device whose turn it is.

`mode=request` follows ServerlessLLM (OSDI '24) and llama-swap, `mode=token` Aegaeon (SOSP '25); both share what is built once in
serving/residency: one host cache, loads that overlap computing layer by layer, several resident models, KV that gives way to
host memory. Policies are in request_level.py, token_level.py, quota.py and dispatch.py. `zero_cost` is a bound to compare
with: the weights of all models are resident beyond the devices' budget, so that a switch takes no time.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict

from baselines.swap.dispatch import Believed, choose, token_bytes
from baselines.swap.options import SwapOptions
from serving.backend import Backend
from serving.capacity import attention_workspace_bytes, ffn_workspace_bytes, require_kv
from serving.errors import CapacityError, UserError
from serving.host import HostedSystem, core_of, pool_config
from serving.interface import Cluster, Demand, Device, DevicePlan, Event, Placement, Request, ServedModel
from serving.memory.budget import format_bytes
from serving.residency.arena import pages_of_image
from serving.residency.image import CARD_FRAME_BYTES, PAGE_BYTES, image_bytes, placed_bytes
from serving.residency.store import HostStore
from serving.workers.config import SwapWorkerConfig


class Swap(HostedSystem):
    """Models that come and go on every device."""

    name = "swap"

    def __init__(self, options: SwapOptions | None = None) -> None:
        self.options = options or SwapOptions()
        super().__init__(self.options.timeline_dir)
        self._store: HostStore | None = None
        self._believed: dict[str, Believed] = {}  # by pool
        self._backlog_bytes: dict[str, float] = {}
        self._moves: dict[int, tuple[str, float]] = {}  # request -> its pool and what it adds to the backlog

    # -- plan ----------------------------------------------------------------------------------------------------------
    def plan(self, cluster: Cluster, models: Sequence[ServedModel], demand: Demand) -> Placement:
        """An arena for weights, a KV pool and a workspace on every device, who is resident at first, and the host cache."""
        kind = cluster.devices[0].kind
        images = {model.name: placed_bytes(model, kind) for model in models}
        cache_bytes = self.options.host_cache_bytes or sum(images.values())
        largest = max(models, key=lambda model: images[model.name])
        if images[largest.name] > cache_bytes // PAGE_BYTES * PAGE_BYTES:
            raise CapacityError(
                f"the host cache of {format_bytes(cache_bytes)} cannot hold {largest.name}, which needs "
                f"{images[largest.name]} bytes ({format_bytes(images[largest.name])}); raise host_cache_bytes"
            )
        plans = tuple(self._plan_device(device, models, images) for device in cluster.devices)
        popular = sorted(models, key=lambda model: (-demand.rate_rps.get(model.name, 0.0), model.name))
        options = {
            **asdict(self.options),
            "host_cache_bytes": cache_bytes,
            "popularity": [model.name for model in popular],
            "resident": self._first_residents(plans, popular, images),
        }
        return Placement(self.name, tuple(models), plans, options)

    def _plan_device(self, device: Device, models: Sequence[ServedModel], images: dict[str, int]) -> DevicePlan:
        limits, page_bytes = self.options.limits, self.options.page_bytes
        spaces = [attention_workspace_bytes(m, limits, device.kind) + ffn_workspace_bytes(m, limits) for m in models]
        free_bytes = device.memory_bytes - sum(sorted(spaces)[-2:])  # a resident and a loading model compute at once
        largest = max(models, key=lambda model: images[model.name])
        missing = images[largest.name] - free_bytes
        if missing > 0:
            raise CapacityError(
                f"{device.name}: {largest.name} needs {format_bytes(images[largest.name])} for weights and "
                f"{format_bytes(max(free_bytes, 0))} of {format_bytes(device.memory_bytes)} are left beside workspaces; {missing} bytes are missing"
            )
        wanted = max(images[largest.name], int(self.options.weights_share * free_bytes))
        unit_bytes = CARD_FRAME_BYTES if device.kind == "cuda" else PAGE_BYTES
        arena_bytes = min(sum(images.values()), wanted) // unit_bytes * unit_bytes
        kv_bytes = (free_bytes - arena_bytes) // page_bytes * page_bytes
        require_kv(device, "of all its models", kv_bytes, page_bytes, models)
        return DevicePlan(device, "swap", {"arena": arena_bytes}, kv_bytes)

    def _first_residents(
        self, plans: Sequence[DevicePlan], popular: Sequence[ServedModel], images: dict[str, int]
    ) -> dict[str, list[str]]:
        """Who is there at the start: everyone under the bound; else the most popular first, each where most room is left."""
        if self.options.zero_cost:
            return {plan.device.name: [model.name for model in popular] for plan in plans}
        room = {plan.device.name: plan.weights_bytes["arena"] for plan in plans}
        resident: dict[str, list[str]] = {name: [] for name in room}
        for model in popular:
            target = max(room, key=room.__getitem__)
            if images[model.name] <= room[target]:
                resident[target].append(model.name)
                room[target] -= images[model.name]
        return resident

    # -- run -----------------------------------------------------------------------------------------------------------
    def start(self, placement: Placement, backend: Backend | None = None) -> None:
        simulated = backend is not None and backend.name == "sim"
        cards = [plan.device.name for plan in placement.devices if plan.device.kind == "cuda"]
        if cards and not simulated:
            if self.options.link_gbps is not None:
                raise UserError(f"{cards[0]}: link_gbps throttles the copies of CPU devices; a card has a link (null)")
            if placement.options["host_cache_bytes"] < sum(placed_bytes(m, "cuda") for m in placement.models):
                raise UserError(f"{cards[0]}: host memory of a card holds all models: leave host_cache_bytes at 0")
        super().start(placement, backend)

    def _launch(self, placement: Placement) -> None:
        models, options = placement.models, placement.options
        images = {model.name: placed_bytes(model, placement.devices[0].device.kind) for model in models}
        numbers = {model.name: number for number, model in enumerate(models)}
        popularity = tuple(numbers[name] for name in options["popularity"])
        primed = _first_in_cache(models, popularity, options["host_cache_bytes"])
        if self._backend.name != "sim" and placement.devices[0].device.kind == "cpu":
            self._store = HostStore(options["host_cache_bytes"], self.options.eviction)
            self._store.promise({number: models[number] for number in primed})
        for place, plan in enumerate(placement.devices):
            arena_bytes = plan.weights_bytes["arena"]
            budget_bytes = plan.device.memory_bytes
            if self.options.zero_cost:
                beyond = max(sum(images.values()) - arena_bytes, 0)
                arena_bytes, budget_bytes = arena_bytes + beyond, budget_bytes + beyond
            everyone = range(len(models))
            name = f"{plan.device.name} KV"
            pool = pool_config(name, plan.kv_bytes, self.options.page_bytes, everyone, self.options.max_running)
            resident = options["resident"][plan.device.name]
            role = SwapWorkerConfig(
                device=plan.device,
                models=models,
                pools=(pool,),
                limits=self.options.limits,
                policy=self.options.policy(popularity),
                budget_bytes=budget_bytes,
                arena_bytes=arena_bytes,
                host_kv_bytes=self.options.host_kv_bytes,
                store=self._store.ref if self._store else None,
                resident=tuple(numbers[model] for model in resident),
                primed=primed[place :: len(placement.devices)],
                loader_cores=self._loader_cores(plan.device),
                link_gbps=self.options.link_gbps,
                host_cache_bytes=options["host_cache_bytes"],
                cache_eviction=self.options.eviction,
                queue_deadline_s=self.options.queue_deadline_s,
            )
            worker = self._start_worker(plan.device, role, self._store.ref.fds if self._store else ())
            self._register_pools(worker, role, self.options, rule="open")  # they wait for seats on the device
            self._believed[name] = Believed(arena_bytes, images, resident)
            self._backlog_bytes[name] = 0.0

    def _loader_cores(self, device: Device) -> tuple[int, ...]:
        own = core_of(device)
        if self.options.loader_core == "own" or own is None:
            return ()
        return tuple(sorted(os.sched_getaffinity(0) - {own}))

    def _choose(self, pools, request: Request):
        backlog = [self._backlog_bytes[pool.name] for pool in pools]
        there = [request.model in self._believed[pool.name] for pool in pools]
        pool = pools[choose(backlog, there, self.options.locality * image_bytes(self._models[request.model]))]
        self._believed[pool.name].use(request.model)
        tokens = request.max_new_tokens + len(request.prompt) / self.options.prefill_chunk
        moved = tokens * token_bytes(self._models[request.model])
        self._moves[request.request_id] = (pool.name, moved)
        self._backlog_bytes[pool.name] += moved
        return pool

    def poll(self) -> list[Event]:
        events = super().poll()
        for event in events:
            if event.kind.terminal and event.request_id in self._moves:
                name, moved = self._moves.pop(event.request_id)
                self._backlog_bytes[name] -= moved
        return events

    def notes(self) -> dict[str, object]:
        """How swapping was set up, for the record."""
        swap: dict[str, object] = {
            "mode": self.options.mode,
            "loader_core": self.options.loader_core,
            "link_gbps": self.options.link_gbps,
            "loaded_bytes": {d.name: worker.read_counters().get("loaded_bytes", 0) for worker, d in self._workers},
            "kv_moved_bytes": {d.name: worker.read_counters().get("kv_moved_bytes", 0) for worker, d in self._workers},
            "host_cache_misses": {d.name: worker.read_counters().get("cache_misses", 0) for worker, d in self._workers},
        }
        if self.options.zero_cost:
            swap["bound"] = (
                "all weights resident beyond the devices' memory: what switches that take no time would give"
            )
        return {"swap": swap}

    def stop(self) -> None:
        super().stop()
        self._believed.clear()
        self._backlog_bytes.clear()
        self._moves.clear()
        if self._store is not None:
            self._store.close()
            self._store = None


def _first_in_cache(models: Sequence[ServedModel], order: Sequence[int], cache_bytes: int) -> tuple[int, ...]:
    """Numbers of `models`, in this order, whose images fit into a host cache of so many bytes together: whoever still does."""
    left, first = cache_bytes // PAGE_BYTES, []
    for number in order:
        pages = pages_of_image(models[number])
        if pages <= left:
            first.append(number)
            left -= pages
    return tuple(first)
