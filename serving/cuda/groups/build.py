"""From a configuration of groups to their worker: shares loaded, a pool opened on every rank's card, steps captured."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from serving.batching import StepLimits
from serving.cuda.build import borrow, card, open_peer_access, open_pool, prepare_process, weights_of
from serving.cuda.groups.kv import GroupGrowth, ReplicaKV, ReplicaPages
from serving.cuda.groups.rank import CardRank
from serving.cuda.groups.runner import GroupRunner
from serving.cuda.groups.worker import CardGroupWorker
from serving.cuda.layers import CardAttentionHalf, CardFFNHalf
from serving.cuda.layout import BLOCK_TOKENS
from serving.growth import PreemptingGrowth
from serving.interface import Device, ServedModel
from serving.layers.sizes import weight_bytes_attention, weight_bytes_ffn
from serving.memory.budget import MemoryBudget
from serving.memory.kv_pool import KVPool
from serving.memory.lent import SharedBudget, SharedPageLender
from serving.parallel.capacity import share_model
from serving.parallel.group import GroupPlan
from serving.parallel.share import ShareOfWeights
from serving.workers.config import CardGroup, CardGroupsConfig, PoolConfig
from serving.workers.counters import Counters
from serving.workers.model_worker import HostedModel

Budgets = dict[str, MemoryBudget | SharedBudget]


@dataclass(frozen=True)
class _Loaded:
    """A group with its shares on their cards, and each rank's pool."""

    group: CardGroup
    ranks: tuple[CardRank, ...]
    pools: tuple[KVPool, ...]

    def replica_kv(self, replica: int) -> ReplicaKV:
        return ReplicaKV([self.ranks[rank].kv for rank in self.group.plan.ranks_of(replica)])

    def growth(self, replica: int, kv: ReplicaKV, limits: StepLimits, counters: Counters) -> PreemptingGrowth:
        ranks = sorted(self.group.plan.ranks_of(replica), key=lambda rank: self.group.devices[rank].index)
        page_bytes = self.group.pools[replica].page_bytes
        return PreemptingGrowth(
            self.group.plan.dp,
            ReplicaPages([self.pools[rank] for rank in ranks], kv, counters),
            lambda _, tokens: kv.geometry.pages(tokens, page_bytes),
            limits.max_batch,
        )


@torch.inference_mode()
def build_card_group_worker(role: CardGroupsConfig, wires) -> CardGroupWorker:
    """A loaded, warmed-up worker. Weights and KV are charged to every rank's device, or to what its engines share; raises
    CapacityError where one cannot hold its share."""
    prepare_process(role.mps_pipe_dir)
    devices = {device.name: device for group in role.groups for device in group.devices}
    cards = {card(device) for device in devices.values()}
    torch.cuda.set_device(card(role.device))
    open_peer_access(cards)
    budgets: Budgets = {name: MemoryBudget(name, device.memory_bytes) for name, device in devices.items()}
    loaded = [_load(group, budgets) for group in role.groups]
    torch.cuda.set_device(card(role.device))
    runners = [GroupRunner(one.group.plan, one.ranks, role.limits) for one in loaded]
    hosted: list[HostedModel] = []
    pools: list[tuple[str, KVPool]] = []
    replicas, growths = [], []
    for one, runner in zip(loaded, runners, strict=True):
        plan, first = one.group.plan, len(hosted)
        replicas.append(range(first, first + plan.dp))
        for replica in range(plan.dp):
            leader, kv = plan.ranks_of(replica)[0], one.replica_kv(replica)
            half, number = one.ranks[leader].attention, first + replica
            hosted.append(HostedModel(number, half, kv, runner, number, half.spec.num_layers))
            pools.append((one.group.pools[replica].name, one.pools[leader]))
            if one.group.lent:
                growths.append(one.growth(replica, kv, role.limits, wires.counters))
    return CardGroupWorker(
        runners, replicas, hosted, pools, role.limits, len(runners), wires.control, wires.tokens, wires.counters,
        role.sample_interval_ms, wires.recorder, growth=GroupGrowth(growths) if growths else None,
    )  # fmt: skip


def _load(group: CardGroup, budgets: Budgets) -> _Loaded:
    ranks, pools = [], []
    for rank, device in enumerate(group.devices):
        budget, lender = borrow(group.lent[rank]) if group.lent else (budgets[device.name], None)
        config = group.pools[group.plan.replica_of(rank)]
        held, pool = load_rank(group.model, group.plan, rank, device, config, budget, lender)
        ranks.append(held)
        pools.append(pool)
    return _Loaded(group, tuple(ranks), tuple(pools))


def load_rank(
    whole: ServedModel,
    plan: GroupPlan,
    rank: int,
    device: Device,
    config: PoolConfig,
    budget: MemoryBudget | SharedBudget,
    lender: SharedPageLender | None = None,
) -> tuple[CardRank, KVPool]:
    """What `rank` of `plan` holds of the `whole` model, on `device`, and its pool as `config` says; both are charged to `budget`."""
    share, model, place = plan.share(rank), share_model(whole, plan, rank), card(device)
    dtype = getattr(torch, model.dtype)
    budget.charge(f"attention weights of {model.name}", weight_bytes_attention(model.spec, model.dtype))
    budget.charge(f"FFN weights of {model.name}", weight_bytes_ffn(model.spec, model.dtype))
    with torch.cuda.device(place), ShareOfWeights(weights_of(whole, place), share) as weights:
        attention = CardAttentionHalf(model.spec, weights, dtype, place)
        ffn = CardFFNHalf(model.spec, weights, dtype, place)
    if lender is None:  # pages that are lent have been charged by whoever lends them
        budget.charge(f"KV pool {config.name}", config.num_pages * config.page_bytes)
    pool = open_pool(config.num_pages, config.page_bytes, [model], config.max_runs, device, lender)
    kv = pool.models[model.name]
    blocks = torch.arange(-(-kv.geometry.max_context_tokens // BLOCK_TOKENS), device=place)
    first_token = share.heads.uneven(whole.spec.vocab_size).start
    return CardRank(attention, ffn, kv, blocks, plan.tp, first_token), pool
