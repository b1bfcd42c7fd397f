"""What a worker is told at its start: plain data, pickled once through its standard input.

Shared regions are named by the file descriptors that the worker inherits; no name exists that could be left behind.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from serving.batching import StepLimits
from serving.cost.contention import Contention
from serving.interface import Device, ServedModel
from serving.memory.lent import LentShape
from serving.pairing import StageProfile
from serving.parallel.exchange import ExchangeShape
from serving.parallel.ffn_part import FFNPart
from serving.parallel.group import GroupPlan
from serving.quota import QuotaRule
from serving.residency.policy import SwapPolicy
from serving.residency.store import StoreRef
from serving.shm.mailbox import MailboxShape
from serving.workers.doorbell import DoorbellRef


@dataclass(frozen=True)
class RegionRef:
    """A shared region as a worker finds it."""

    fd: int
    size_bytes: int


@dataclass(frozen=True)
class PoolConfig:
    """One KV pool of a device: CrossPool has one for all its models, a static partition one a model."""

    name: str
    num_pages: int
    page_bytes: int
    models: tuple[int, ...]  # indices into the worker's models
    max_runs: int  # live requests of one model


@dataclass(frozen=True)
class LentRef:
    """Memory of a device that engines of several processes share, as `engine` finds it: the ledger, and the file of pages."""

    ledger: RegionRef
    pages_fd: int
    shape: LentShape
    engine: int


@dataclass(frozen=True)
class Bells:
    """Host-driven control of one mailbox: each hand-over goes through the relay's process, in both directions."""

    attention_to_relay: DoorbellRef
    relay_to_ffn: DoorbellRef
    ffn_to_relay: DoorbellRef
    relay_to_attention: DoorbellRef

    @classmethod
    def new(cls) -> Bells:
        return cls(*(DoorbellRef.new() for _ in range(4)))

    @property
    def doorbells(self) -> tuple[DoorbellRef, ...]:
        return (self.attention_to_relay, self.relay_to_ffn, self.ffn_to_relay, self.relay_to_attention)


@dataclass(frozen=True)
class MailboxRef:
    """A mailbox between one attention worker and one FFN worker. With `bells` control is host-driven, without lowered."""

    region: RegionRef
    shape: MailboxShape
    bells: Bells | None = None


@dataclass(frozen=True)
class Channel:
    """What every worker has towards the host."""

    control: RegionRef  # ring: host to worker
    control_bell_fd: int  # rung with every message on it
    tokens: RegionRef  # ring: worker to host
    counters: RegionRef  # words of serving.workers.counters


@dataclass(frozen=True)
class ModelWorkerConfig:
    """A worker that holds KV and attention halves. `ffn_ports[i]` is the mailbox of model i, or -1 for FFN in place;
    `ffn_indices[i]` is the number under which the FFN worker behind that mailbox knows model i. Where a model's FFN lies
    behind several mailboxes, `ffn_legs` has for each of its layers the (mailbox, number) pairs that its rows go to, in order
    of rank: what comes back from them is added up. With `stages` 4 transfers are stages of their own, with 2 they are part of
    the stage before them. `growth` says whether admission has promised all that a sequence may need, or it may pause for
    pages (:mod:`serving.pausing`), or the youngest is preempted (:mod:`serving.growth`, where `quotas` may bound each model); the
    last two need a single pool, and the last a single lane. Where `lent`, other engines borrow the pool's pages too, and
    share the core. With `prefill_first` models with prompts to compute step before others. With `profiles`, one a model,
    models step beside those whose stages fill their gaps (:mod:`serving.pairing`). At most `chunks_in_flight` chunks of one
    prompt are in flight at once."""

    device: Device
    models: tuple[ServedModel, ...]
    pools: tuple[PoolConfig, ...]
    limits: StepLimits
    lanes: int
    ffn_ports: tuple[int, ...]
    ffn_indices: tuple[int, ...]
    mailboxes: tuple[MailboxRef, ...] = ()
    sample_interval_ms: float = 50.0
    ffn_legs: Mapping[int, tuple[tuple[tuple[int, int], ...], ...]] = field(default_factory=dict)  # by model, by layer
    stages: int = 4
    growth: str = "reserved"  # reserved | pause | preempt
    profiles: tuple[StageProfile, ...] = ()
    quotas: QuotaRule | None = None
    lent: LentRef | None = None
    prefill_first: bool = False
    chunks_in_flight: int = 1
    evict_idle_s: float = 0.0  # weights lie in lent pages, and go after so long without a request; 0: they stay
    mps_pipe_dir: str = ""  # of the service through which engines share a card; empty: in turns


@dataclass(frozen=True)
class FFNWorkerConfig:
    """A worker that holds FFN halves, or `parts` of them where given (one a model), and serves mailboxes, one an attention
    worker."""

    device: Device
    models: tuple[ServedModel, ...]
    limits: StepLimits
    mailboxes: tuple[MailboxRef, ...]
    parts: tuple[FFNPart, ...] = ()
    stages: int = 4  # as in ModelWorkerConfig


@dataclass(frozen=True)
class RelayConfig:
    """The third party of host-driven control: it holds nothing and hands over every stage of every lane."""

    bells: tuple[Bells, ...]


@dataclass(frozen=True)
class GroupRef:
    """What the ranks of one group share: the exchange, and a ring of orders from rank 0 to each of the others."""

    plan: GroupPlan
    shape: ExchangeShape
    exchange: RegionRef
    orders: tuple[RegionRef, ...]


@dataclass(frozen=True)
class GroupSeat:
    """A model that a device serves a share of, as `rank` of `group`; a model served whole has a group of one."""

    model: ServedModel
    group: GroupRef
    rank: int

    @property
    def replica(self) -> int:
        return self.group.plan.replica_of(self.rank)


@dataclass(frozen=True)
class GroupWorkerConfig:
    """A worker that holds seats in groups. Pool indices are of seats. Rank 0 of a group takes the requests of all its
    replicas: `targets[i]` is the (seat, replica) that the host's model number i stands for."""

    device: Device
    seats: tuple[GroupSeat, ...]
    pools: tuple[PoolConfig, ...]
    limits: StepLimits
    targets: tuple[tuple[int, int], ...]
    sample_interval_ms: float = 50.0
    uncoordinated: Contention | None = None  # each seat an engine of its own that takes device and KV as it finds them
    optimistic: bool = False  # more may be admitted than can run; who cannot step in the next batch then holds no KV
    evict_idle_s: float = 0.0  # as in ModelWorkerConfig
    tells_first_tokens: bool = False  # the host reacts to them (simulated: it looks at once)


@dataclass(frozen=True)
class CardGroup:
    """A model on several cards, `devices` by rank of its `plan`. `pools` are its replicas', each on all cards of the replica's
    ranks. Where `lent` (by rank), other engines borrow the pages of those devices too."""

    model: ServedModel
    plan: GroupPlan
    devices: tuple[Device, ...]
    pools: tuple[PoolConfig, ...]
    lent: tuple[LentRef, ...] = ()


@dataclass(frozen=True)
class CardGroupsConfig:
    """One process that drives all cards of `groups`, where kernels of different cards meet without the host. The host's model
    number i is replica i, counted through all groups. A group whose pages are lent is the only one."""

    device: Device  # that stands for all in what is counted
    groups: tuple[CardGroup, ...]
    limits: StepLimits
    sample_interval_ms: float = 50.0
    mps_pipe_dir: str = ""  # as in ModelWorkerConfig


@dataclass(frozen=True)
class SwapWorkerConfig:
    """A worker whose models come and go (serving/residency): weights in an arena of `arena_bytes`, copied from the host cache
    `store` (None where simulated), on the cores `loader_cores` (empty: the device's own) and at most at `link_gbps` (None: as
    fast as it goes). `resident` are there from the start, and images of `primed` are put into the cache then. KV that gives way
    has `host_kv_bytes` of host memory. All of it is charged to `budget_bytes`, which is more than the device has where a bound
    is run."""

    device: Device
    models: tuple[ServedModel, ...]
    pools: tuple[PoolConfig, ...]  # one, of all models
    limits: StepLimits
    policy: SwapPolicy
    budget_bytes: int
    arena_bytes: int
    host_kv_bytes: int
    store: StoreRef | None
    resident: tuple[int, ...]
    primed: tuple[int, ...]
    loader_cores: tuple[int, ...] = ()
    link_gbps: float | None = None
    host_cache_bytes: int = 0  # of the store; what a simulated one may hold
    cache_eviction: str = "lru"
    queue_deadline_s: float = 0.0  # who waited so long for a seat is let go; 0: never
    sample_interval_ms: float = 50.0


Role = ModelWorkerConfig | FFNWorkerConfig | RelayConfig | GroupWorkerConfig | CardGroupsConfig | SwapWorkerConfig


@dataclass(frozen=True)
class WorkerConfig:
    """The envelope: who the worker is, where its host hears from it, its role, and where it records its timeline."""

    name: str
    core: int | None
    channel: Channel
    status_fd: int
    role: Role
    timeline: Path | None = None
