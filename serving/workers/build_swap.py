"""From a swapping worker's configuration to the worker: arena, host cache, KV pool, and who is there from the start."""

from __future__ import annotations

from collections.abc import Callable

from serving.interface import ServedModel
from serving.memory.budget import MemoryBudget
from serving.memory.kv_pool import KVGeometry
from serving.memory.offload import HostKV
from serving.residency.arena import DeviceArena, pages_of_image
from serving.residency.controller import Facts, SwapController
from serving.residency.image import PAGE_BYTES, num_units
from serving.residency.loader import Loader
from serving.residency.store import StoreClient
from serving.workers.build import open_pool, warm_up_attention, warm_up_ffn
from serving.workers.config import SwapWorkerConfig
from serving.workers.model_worker import HostedModel
from serving.workers.swap_worker import LANES, GatedFFN, SwapWorker

_GUESSED_GBPS = 5.0  # of a load before the first was measured


def controller_of(
    role: SwapWorkerConfig,
    load_bytes_per_s: float | None = None,
    pages_of: Callable[[ServedModel], int] = pages_of_image,
) -> SwapController:
    """The controller of a device, real or simulated, its first models resident; loads are expected at `load_bytes_per_s`.
    `pages_of` counts the pages of PAGE_BYTES that a model's image takes."""
    rate = load_bytes_per_s or (role.link_gbps or _GUESSED_GBPS) * 1e9
    geometries = [KVGeometry.of(model.spec, model.dtype) for model in role.models]
    facts = [
        Facts(pages, geometry.token_bytes * geometry.num_layers, round(pages * PAGE_BYTES / rate * 1e9))
        for pages, geometry in zip(map(pages_of, role.models), geometries, strict=True)
    ]
    (pool,) = role.pools
    controller = SwapController(
        facts,
        role.arena_bytes // PAGE_BYTES,
        pool.num_pages,
        role.host_kv_bytes,
        lambda model, tokens: geometries[model].pages(tokens, pool.page_bytes),
        role.policy,
        round(role.queue_deadline_s * 1e9),
    )
    for model in role.resident:
        controller.start_resident(model, num_units(role.models[model]))
    return controller


def build_swap_worker(role: SwapWorkerConfig, wires) -> SwapWorker:
    """A worker whose first models are loaded and warmed up. Raises CapacityError when its device cannot hold its pools."""
    budget = MemoryBudget(role.device.name, role.budget_bytes)
    budget.charge("weights arena", role.arena_bytes)
    arena = DeviceArena(role.arena_bytes // PAGE_BYTES, role.models)
    (config,) = role.pools
    pool = open_pool(config, role.models, role.device, budget)
    controller = controller_of(role)
    store = StoreClient(role.store, role.models)
    store.prime(role.primed)
    loader = Loader(store, arena, controller.units, set(role.loader_cores) or None, role.link_gbps)
    spaces = arena.spaces
    port = GatedFFN({index: space.ffn for index, space in enumerate(spaces)}, LANES, controller.units)
    hosted = [
        HostedModel(index, spaces[index].attention, pool.models[model.name], port, index, model.spec.num_layers)
        for index, model in enumerate(role.models)
    ]
    for index in role.resident:
        loader.load_now(index)
        warm_up_attention(hosted[index].half, hosted[index].kv)
        warm_up_ffn(spaces[index].ffn, role.models[index])
    return SwapWorker(
        controller,
        arena,
        loader,
        HostKV(role.host_kv_bytes),
        models=hosted,
        pools=[(config.name, pool)],
        limits=role.limits,
        control=wires.control,
        tokens=wires.tokens,
        counters=wires.counters,
        sample_interval_ms=role.sample_interval_ms,
        recorder=wires.recorder,
    )
