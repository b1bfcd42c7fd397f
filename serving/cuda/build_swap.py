"""From a swapping worker's configuration to a worker on a card: arena, pinned images, graphs of every model, who is there first."""

from __future__ import annotations

import torch

from serving.cuda.build import card, open_pool, prepare_process, weights_of
from serving.cuda.capture import CardModel
from serving.cuda.ffn_parts import FFNParts
from serving.cuda.residency import CardArena, CardLoader
from serving.cuda.runner import StepRunner
from serving.cuda.worker import CardSwapWorker
from serving.memory.budget import MemoryBudget
from serving.memory.offload import HostKV
from serving.residency.image import CARD_FRAME_BYTES, PAGE_BYTES, placed_bytes
from serving.workers.build_swap import controller_of
from serving.workers.config import SwapWorkerConfig
from serving.workers.model_worker import HostedModel
from serving.workers.swap_worker import LANES


@torch.inference_mode()
def build_card_swap_worker(role: SwapWorkerConfig, wires) -> CardSwapWorker:
    """A worker whose models have been on the card once, each alone, and whose first models are there. Raises CapacityError
    when the card cannot hold its pools."""
    prepare_process()
    device = card(role.device)
    torch.cuda.set_device(device)
    budget = MemoryBudget(role.device.name, role.budget_bytes)
    budget.charge("weights arena", role.arena_bytes)
    arena = CardArena(role.arena_bytes // CARD_FRAME_BYTES, role.models, device)
    for index, model in enumerate(role.models):
        arena.open(index).build(weights_of(model, device))
        torch.cuda.synchronize(device)
        arena.evict(index)
    (config,) = role.pools
    budget.charge(f"KV pool {config.name}", config.num_pages * config.page_bytes)
    pool = open_pool(config.num_pages, config.page_bytes, list(role.models), config.max_runs, role.device)
    kvs = [pool.models[model.name] for model in role.models]
    controller = controller_of(role, pages_of=lambda model: placed_bytes(model, "cuda") // PAGE_BYTES)
    loader = CardLoader(arena, controller.units, device)
    models = [
        CardModel.of(image.attention, FFNParts(image.ffn), kv) for image, kv in zip(arena.images, kvs, strict=True)
    ]
    runner = StepRunner(models, LANES, role.limits, "fused", loader)
    for index in role.resident:
        loader.load_now(index)
    hosted = [
        HostedModel(i, image.attention, kv, runner, i, image.model.spec.num_layers)
        for i, (image, kv) in enumerate(zip(arena.images, kvs, strict=True))
    ]
    return CardSwapWorker(
        controller,
        arena,
        loader,
        HostKV(role.host_kv_bytes, pinned=True),
        runner=runner,
        models=hosted,
        pools=[(config.name, pool)],
        limits=role.limits,
        control=wires.control,
        tokens=wires.tokens,
        counters=wires.counters,
        sample_interval_ms=role.sample_interval_ms,
        recorder=wires.recorder,
    )
