"""From a worker's configuration to a worker on cards: budgets charged, halves loaded, steps captured."""

from __future__ import annotations

import itertools
import os
from collections.abc import Collection

import torch

from serving.checkpoints import open_weights
from serving.checkpoints.weights import Weights
from serving.cuda import driver, mps
from serving.cuda.capture import CardModel
from serving.cuda.config import CardWorkerConfig
from serving.cuda.dummy import CardDummyWeights
from serving.cuda.ffn_parts import FFNParts
from serving.cuda.layers import CardAttentionHalf, CardFFNHalf
from serving.cuda.layout import BLOCK_TOKENS
from serving.cuda.memory import CardMemory
from serving.cuda.runner import StepRunner
from serving.cuda.worker import CardWorker
from serving.errors import UserError
from serving.interface import Device, ServedModel
from serving.layers.sizes import weight_bytes_attention, weight_bytes_ffn
from serving.memory.budget import MemoryBudget
from serving.memory.kv_pool import KVPool
from serving.memory.lent import SharedBudget, SharedPageLender
from serving.parallel.ffn_part import WHOLE_FFN, FFNPart
from serving.parallel.share import ShareOfWeights
from serving.shm.region import SharedRegion
from serving.workers.config import LentRef, ModelWorkerConfig
from serving.workers.mapped_pages import growth_over
from serving.workers.model_worker import HostedModel


def prepare_process(mps_pipe_dir: str = "") -> None:
    """What must be set before the driver starts: nothing may load beside a kernel that waits, and streams that wait for
    each other must not share a hardware queue. With `mps_pipe_dir` the process is a client of that service."""
    if mps_pipe_dir:
        mps.join(mps_pipe_dir)
    os.environ["CUDA_MODULE_LOADING"] = "EAGER"
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "32"
    if not torch.cuda.is_available():
        raise UserError("a device of kind cuda was asked for, but torch sees none (see python -m serving.doctor)")


def card(device: Device) -> torch.device:
    """The card of a device. Raises UserError where this machine has no such card."""
    if device.index >= torch.cuda.device_count():
        raise UserError(f"{device.name} is card {device.index}, but this machine has {torch.cuda.device_count()}")
    return torch.device("cuda", device.index)


def open_peer_access(cards: Collection[torch.device]) -> None:
    """Let kernels on each of `cards` reach the memory of all others. Raises UserError where two of them cannot."""
    for one, other in itertools.permutations(cards, 2):
        torch.zeros(1, device=other)  # both need a context
        with torch.cuda.device(one):
            torch.zeros(1, device=one)
            driver.allow_peer(one.index, other.index)


def borrow(lent: LentRef) -> tuple[SharedBudget, SharedPageLender]:
    """An engine's part in memory that it shares with others."""
    ledger = SharedRegion(lent.ledger.size_bytes, fd=lent.ledger.fd)
    return SharedBudget(ledger, lent.shape, lent.engine), SharedPageLender(ledger, lent.shape, lent.engine)


def weights_of(model: ServedModel, device: torch.device) -> Weights:
    if model.dummy:
        return CardDummyWeights(model.spec, device=device, dtype=getattr(torch, model.dtype))
    return open_weights(model)


def load_attention(model: ServedModel, device: Device, budget: MemoryBudget | SharedBudget) -> CardAttentionHalf:
    budget.charge(f"attention weights of {model.name}", weight_bytes_attention(model.spec, model.dtype))
    with weights_of(model, card(device)) as weights:
        return CardAttentionHalf(model.spec, weights, getattr(torch, model.dtype), card(device))


def load_ffn(
    model: ServedModel, device: Device, budget: MemoryBudget | SharedBudget, part: FFNPart = WHOLE_FFN
) -> CardFFNHalf:
    """The layers of `part`, as wide as it is, on `device`."""
    spec = part.model(model).spec
    budget.charge(f"FFN weights of {model.name}", weight_bytes_ffn(spec, model.dtype, part.layers))
    with ShareOfWeights(weights_of(model, card(device)), part.share) as weights:
        return CardFFNHalf(spec, weights, getattr(torch, model.dtype), card(device), part.layers)


def open_pool(
    num_pages: int,
    page_bytes: int,
    models: list[ServedModel],
    max_runs: int,
    device: Device,
    lender: SharedPageLender | None = None,
) -> KVPool:
    """A KV pool in a card's memory; with `lender`, of pages that engines of other processes are lent too. Raises UserError
    where a run would not begin on a block."""
    memory = CardMemory(card(device), lent=lender is not None)
    pool = KVPool(num_pages, page_bytes, [(m.spec, m.dtype) for m in models], max_runs, memory, lender)
    for kv in pool.models.values():
        if kv.run_slots % BLOCK_TOKENS:
            raise UserError(f"pages of {page_bytes} bytes do not hold whole blocks of {kv.geometry.model}")
    return pool


@torch.inference_mode()
def build_card_worker(role: ModelWorkerConfig, wires) -> CardWorker:
    """A loaded, warmed-up worker; `wires` is what every worker has towards its host. Weights and KV are charged to the
    devices' budgets; what the driver, the vendor's libraries and graphs need comes on top, and a page that anchors a pool."""
    prepare_process(role.mps_pipe_dir)
    torch.cuda.set_device(card(role.device))
    crosspool = isinstance(role, CardWorkerConfig)
    in_place = ((role.device, WHOLE_FFN),)
    ffn_parts = role.ffn_parts if crosspool else (in_place,) * len(role.models)
    ffn_devices = list(dict.fromkeys(device for parts in ffn_parts for device, _ in parts))
    open_peer_access({card(device) for device in (role.device, *ffn_devices)})
    budgets: dict[str, MemoryBudget | SharedBudget] = {
        device.name: MemoryBudget(device.name, device.memory_bytes) for device in (role.device, *ffn_devices)
    }
    lender = None
    if role.lent is not None:
        budgets[role.device.name], lender = borrow(role.lent)
    attention = [load_attention(model, role.device, budgets[role.device.name]) for model in role.models]
    ffns = [
        FFNParts(
            *(load_ffn(model, device, budgets[device.name], part) for device, part in parts),
            cut=parts[0][1].width.parts > 1,
        )
        for model, parts in zip(role.models, ffn_parts, strict=True)
    ]
    pools = []
    for config in role.pools:
        if lender is None:  # pages that are lent have been charged by whoever lends them
            budgets[role.device.name].charge(f"KV pool {config.name}", config.num_pages * config.page_bytes)
        hosted = [role.models[index] for index in config.models]
        pool = open_pool(config.num_pages, config.page_bytes, hosted, config.max_runs, role.device, lender)
        pools.append((config.name, pool))
    kv_of = {name: kv for _, pool in pools for name, kv in pool.models.items()}
    kvs = [kv_of[model.name] for model in role.models]
    models = [CardModel.of(*parts) for parts in zip(attention, ffns, kvs, strict=True)]
    runner = StepRunner(models, role.lanes, role.limits, role.control if crosspool else "fused")
    hosted = [
        HostedModel(i, half, kv, runner, i, half.spec.num_layers)
        for i, (half, kv) in enumerate(zip(attention, kvs, strict=True))
    ]
    return CardWorker(
        runner, hosted, pools, role.limits, role.lanes, wires.control, wires.tokens, wires.counters,
        role.sample_interval_ms, wires.recorder,
        growth=growth_over(role, pools[0][1], kvs, wires.counters), prefill_first=role.prefill_first,
    )  # fmt: skip
