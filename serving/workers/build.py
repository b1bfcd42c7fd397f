"""From a worker's configuration to the worker: attach the shared regions, charge the budget, load the halves."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from serving.checkpoints import open_weights
from serving.idle import IdleWeights
from serving.interface import Device, ServedModel
from serving.layers.attention_half import AttentionHalf
from serving.layers.batch import BatchLayout
from serving.layers.ffn_half import FFNHalf
from serving.layers.sizes import weight_bytes_attention, weight_bytes_ffn
from serving.memory.budget import MemoryBudget
from serving.memory.kv_pool import KVPool, ModelKV
from serving.memory.lent import LentMemory, SharedBudget, SharedPageLender
from serving.parallel.exchange import Exchange
from serving.parallel.ffn_part import WHOLE_FFN, FFNPart
from serving.parallel.share import Share, ShareOfWeights, share_spec
from serving.residency.lent_weights import LentWeights, MappedWeights
from serving.residency.staying import load_attention, load_ffn
from serving.shm.bell import Bell
from serving.shm.mailbox import Mailbox
from serving.shm.region import SharedRegion
from serving.shm.ring import BelledRing, Ring
from serving.workers.config import (
    CardGroupsConfig,
    FFNWorkerConfig,
    GroupSeat,
    GroupWorkerConfig,
    LentRef,
    MailboxRef,
    ModelWorkerConfig,
    PoolConfig,
    RegionRef,
    RelayConfig,
    SwapWorkerConfig,
    WorkerConfig,
)
from serving.workers.counters import Counters
from serving.workers.ffn_worker import FFNWorker
from serving.workers.group_member import GroupMember, HeldShare
from serving.workers.group_worker import GroupWorker
from serving.workers.mapped_pages import growth_over
from serving.workers.model_worker import HostedModel, ModelWorker
from serving.workers.ports import FFNPort, LocalFFN, RelayedFFN, RemoteFFN, SpreadFFN
from serving.workers.relay_worker import RelayWorker
from serving.workers.timeline import Recorder

WHOLE = Share()
MANY_ROWS = 96  # of a prompt that meets all kernels, and nearly all experts


def attach(ref: RegionRef) -> SharedRegion:
    return SharedRegion(ref.size_bytes, fd=ref.fd)


@dataclass(frozen=True)
class _Wires:
    """What every worker has towards its host."""

    control: BelledRing
    tokens: Ring
    counters: Counters
    recorder: Recorder | None


def build_worker(
    config: WorkerConfig, recorder: Recorder | None
) -> ModelWorker | FFNWorker | RelayWorker | GroupWorker:
    """A loaded, warmed-up worker. Raises CapacityError when its device cannot hold what it is told to."""
    channel, role = config.channel, config.role
    wires = _Wires(
        BelledRing(attach(channel.control), Bell(channel.control_bell_fd)),
        Ring(attach(channel.tokens)),
        Counters(attach(channel.counters)),
        recorder,
    )
    if isinstance(role, ModelWorkerConfig):
        if role.device.kind == "cuda" and role.evict_idle_s:
            from serving.cuda.lent_weights import build_lent_weights_worker

            return build_lent_weights_worker(role, wires)
        if role.device.kind == "cuda":
            from serving.cuda.build import build_card_worker  # Triton and a driver, which CPU runs need not have

            return build_card_worker(role, wires)
        return _build_model_worker(role, wires)
    if isinstance(role, FFNWorkerConfig):
        return _build_ffn_worker(role, wires)
    if isinstance(role, GroupWorkerConfig):
        return _build_group_worker(role, wires)
    if isinstance(role, CardGroupsConfig):
        from serving.cuda.groups.build import build_card_group_worker

        return build_card_group_worker(role, wires)
    if isinstance(role, SwapWorkerConfig):
        if role.device.kind == "cuda":
            from serving.cuda.build_swap import build_card_swap_worker

            return build_card_swap_worker(role, wires)
        from serving.workers.build_swap import build_swap_worker

        return build_swap_worker(role, wires)
    return _build_relay_worker(role, wires)


def _build_relay_worker(role: RelayConfig, wires: _Wires) -> RelayWorker:
    return RelayWorker(role.bells, wires.control, wires.counters)


def _mailbox(ref: MailboxRef) -> Mailbox:
    return Mailbox(attach(ref.region), ref.shape)


def _remote(ref: MailboxRef) -> FFNPort:
    return RemoteFFN(_mailbox(ref)) if ref.bells is None else RelayedFFN(_mailbox(ref), ref.bells)


def _load_attention(model: ServedModel, budget: MemoryBudget | SharedBudget, share: Share = WHOLE) -> AttentionHalf:
    budget.charge(
        f"attention weights of {model.name}", weight_bytes_attention(share_spec(model.spec, share), model.dtype)
    )
    with ShareOfWeights(open_weights(model), share) as weights:
        return load_attention(weights, model.dtype)


def _load_ffn(
    model: ServedModel, budget: MemoryBudget | SharedBudget, share: Share = WHOLE, part: FFNPart = WHOLE_FFN
) -> FFNHalf:
    spec = share_spec(model.spec, share)
    budget.charge(f"FFN weights of {model.name}", weight_bytes_ffn(spec, model.dtype, part.layers))
    with ShareOfWeights(open_weights(model), share) as weights:
        return load_ffn(weights, model.dtype, part.layers)


def open_pool(config: PoolConfig, models: tuple[ServedModel, ...], device: Device, budget: MemoryBudget) -> KVPool:
    budget.charge(f"KV pool {config.name}", config.num_pages * config.page_bytes)
    hosted = [(models[index].spec, models[index].dtype) for index in config.models]
    return KVPool(config.num_pages, config.page_bytes, hosted, config.max_runs)


def _borrow_pool(
    config: PoolConfig, models: tuple[ServedModel, ...], lender: SharedPageLender, lent: LentRef
) -> KVPool:
    """A pool over pages that are charged already and that other engines borrow too."""
    hosted = [(models[index].spec, models[index].dtype) for index in config.models]
    return KVPool(config.num_pages, config.page_bytes, hosted, config.max_runs, LentMemory(lent.pages_fd), lender)


def _build_model_worker(role: ModelWorkerConfig, wires: _Wires) -> ModelWorker:
    lent, lender = role.lent, None
    if lent is None:
        budget: MemoryBudget | SharedBudget = MemoryBudget(role.device.name, role.device.memory_bytes)
    else:
        ledger = attach(lent.ledger)
        budget = SharedBudget(ledger, lent.shape, lent.engine)
        lender = SharedPageLender(ledger, lent.shape, lent.engine)
    borrowed = [(config.name, _borrow_pool(config, role.models, lender, lent)) for config in role.pools if lent]
    idle = None
    if role.evict_idle_s:
        mapped = MappedWeights(role.models[0], borrowed[0][1])
        weights = LentWeights(mapped, lender, wires.counters)
        weights.start()
        halves, local = [mapped.attention], {0: mapped.ffn}
        idle = IdleWeights(role.evict_idle_s, weights)
    else:
        halves = [_load_attention(model, budget) for model in role.models]
        in_place = (i for i, port in enumerate(role.ffn_ports) if port < 0 and i not in role.ffn_legs)
        local = {i: _load_ffn(role.models[i], budget) for i in in_place}
    remote = [_remote(ref) for ref in role.mailboxes]
    spread = SpreadFFN(remote, role.ffn_legs, role.lanes)
    in_place = LocalFFN(local, role.lanes)
    pools = borrowed or [(config.name, open_pool(config, role.models, role.device, budget)) for config in role.pools]
    kv_of = {name: kv for _, pool in pools for name, kv in pool.models.items()}
    hosted = [
        HostedModel(
            index=i,
            half=halves[i],
            kv=kv_of[model.name],
            port=spread if i in role.ffn_legs else in_place if role.ffn_ports[i] < 0 else remote[role.ffn_ports[i]],
            ffn_index=i if role.ffn_ports[i] < 0 or i in role.ffn_legs else role.ffn_indices[i],
            num_layers=model.spec.num_layers,
        )
        for i, model in enumerate(role.models)
    ]
    for model in hosted:
        with pools[0][1].lender.deciding():  # one engine at a time, so that a small pool is enough
            warm_up_attention(model.half, model.kv)
    for i, half in local.items():
        warm_up_ffn(half, role.models[i])
    growth = growth_over(role, pools[0][1], [model.kv for model in hosted], wires.counters, idle)
    return ModelWorker(
        hosted,
        pools,
        role.limits,
        role.lanes,
        wires.control,
        wires.tokens,
        wires.counters,
        role.sample_interval_ms,
        wires.recorder,
        role.stages,
        growth,
        role.profiles,
        prefill_first=role.prefill_first,
        shares_core=lent is not None,
        chunks_in_flight=role.chunks_in_flight,
    )


def _build_ffn_worker(role: FFNWorkerConfig, wires: _Wires) -> FFNWorker:
    budget = MemoryBudget(role.device.name, role.device.memory_bytes)
    halves = []
    for model, part in zip(role.models, role.parts or [WHOLE_FFN] * len(role.models), strict=True):
        half = _load_ffn(model, budget, part.share, part)
        warm_up_ffn(half, model, part)
        halves.append((half, model.spec.hidden_size, getattr(torch, model.dtype)))
    mailboxes = [(_mailbox(ref), ref.bells) for ref in role.mailboxes]
    return FFNWorker(halves, mailboxes, wires.control, wires.counters, wires.recorder, role.stages)


def _build_group_worker(role: GroupWorkerConfig, wires: _Wires) -> GroupWorker:
    budget = MemoryBudget(role.device.name, role.device.memory_bytes)
    shares = tuple(_share_of(seat) for seat in role.seats)
    pools = [(config.name, open_pool(config, shares, role.device, budget)) for config in role.pools]
    pool_of = {index: pool for config, (_, pool) in zip(role.pools, pools, strict=True) for index in config.models}
    members = []
    for index, seat in enumerate(role.seats):
        plan, share = seat.group.plan, seat.group.plan.share(seat.rank)
        held = HeldShare(
            index=index,
            attention=_load_attention(seat.model, budget, share),
            ffn=_load_ffn(seat.model, budget, share),
            kv=pool_of[index].models[seat.model.name],
            first_token=share.heads.uneven(seat.model.spec.vocab_size).start,
        )
        warm_up_attention(held.attention, held.kv)
        warm_up_ffn(held.ffn, seat.model)
        exchange = Exchange(attach(seat.group.exchange), seat.group.shape, seat.rank)
        rings = seat.group.orders if seat.rank == 0 else seat.group.orders[seat.rank - 1 : seat.rank]
        orders = [Ring(attach(ref)) for ref in rings]
        members.append(GroupMember(plan, seat.rank, held, exchange, orders, role.limits, wires.recorder))
    return GroupWorker(
        members, pools, role.targets, wires.control, wires.tokens, wires.counters, role.sample_interval_ms
    )


def _share_of(seat: GroupSeat) -> ServedModel:
    """The seat's share as a model of its own, for its KV."""
    return dataclasses.replace(seat.model, spec=share_spec(seat.model.spec, seat.group.plan.share(seat.rank)))


def warm_up_attention(half: AttentionHalf, kv: ModelKV) -> None:
    """A prefill and a decode step through the first layer, and a prompt of many rows through all of them over a cache of its own
    (the pool may hold less), so that no request pays for first-use set-up."""
    run = kv.open_run()
    tokens = min(4, kv.geometry.max_context_tokens)
    kv.grow(run, tokens)
    with torch.inference_mode():
        for rows in (tokens - 1, 1):
            cached = tokens if rows == 1 else rows
            layout = BatchLayout((rows,), (cached,), (run.start_slot,), (rows - 1,))
            hidden = half.embed(torch.zeros(rows, dtype=torch.int64))
            hidden, ffn_in = half.attend(0, hidden, None, kv.layers[0], layout)
            half.logits(hidden, ffn_in, layout)
        rows = min(MANY_ROWS, kv.geometry.max_context_tokens)
        layout, hidden = (
            BatchLayout((rows,), (rows,), (0,), (rows - 1,)),
            half.embed(torch.zeros(rows, dtype=torch.int64)),
        )
        for layer, cache in enumerate(kv.layers):
            half.attend(layer, hidden, hidden, torch.zeros(rows, *cache.shape[1:], dtype=cache.dtype), layout)
    kv.close_run(run)


def warm_up_ffn(half: FFNHalf, model: ServedModel, part: FFNPart = WHOLE_FFN) -> None:
    """One row, a few and many through every layer held. Many differ, so that experts are all read: whoever reads weights first
    after they were written waits longer for them (on a virtual machine a first prompt took 20 to 85 ms longer)."""
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for rows in (1, 5, MANY_ROWS):
            hidden = torch.randn(rows, model.spec.hidden_size, generator=generator).to(getattr(torch, model.dtype))
            for layer in range(model.spec.num_layers):
                if part.holds(layer):
                    half.forward(layer, hidden)
