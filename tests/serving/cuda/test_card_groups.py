"""One model over several cards, judged on the CPU: ranks in threads, whose rows meet at a barrier as cards' meet in exchanges.
Cards run the same code over CUDA forms (tests/serving/cuda/test_several_cards.py)."""

from __future__ import annotations

import dataclasses
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import judges
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.batching import StepLimits
from serving.checkpoints import open_checkpoint
from serving.cuda.groups.kv import GroupGrowth, ReplicaKV, ReplicaPages
from serving.cuda.groups.parts import GroupParts
from serving.cuda.groups.rank import CardRank
from serving.cuda.groups.rows import AloneRows
from serving.cuda.groups.worker import CardGroupWorker
from serving.cuda.layers import CardAttentionHalf, CardFFNHalf
from serving.cuda.layout import BLOCK_TOKENS, CardLayout
from serving.growth import PreemptingGrowth
from serving.memory.kv_pool import KVPool
from serving.parallel.group import GroupPlan
from serving.parallel.host import Instance, sharing_devices
from serving.parallel.share import ShareOfWeights, share_spec
from serving.part_shapes import shapes_of
from serving.scheduler import StepScheduler
from serving.sequence import Sequence
from serving.shm.bell import Bell
from serving.shm.region import SharedRegion
from serving.shm.ring import BelledRing, Ring
from serving.spec import load_spec
from serving.workers.counters import REGION_BYTES, Counters
from serving.workers.messages import Stop, Submit, Tokens, decode, encode
from serving.workers.model_worker import HostedModel

pytestmark = pytest.mark.cpu

CPU = torch.device("cpu")
PAGE_BYTES = 1 << 14
LIMITS = StepLimits(max_batch=3, prefill_chunk=20)
CASES = [
    ("mixtral", 2, 1),
    ("qwen3_moe", 2, 2),
    ("qwen3_moe", 1, 2),
    ("deepseek_v2", 1, 2),
    ("deepseek_v2", 2, 1),
    ("glm4_moe_lite", 1, 4),
    ("deepseek", 1, 2),
]


class MeetingRows:
    """One rank's rows, and the others' at a barrier: what an exchange does, with no kernel."""

    def __init__(self, plan: GroupPlan, rank: int, board: list, barrier: threading.Barrier) -> None:
        self._plan, self._rank, self._board, self._barrier = plan, rank, board, barrier
        self._own = plan.ranks_of(plan.replica_of(rank))

    def _all(self, rows: torch.Tensor) -> list[torch.Tensor]:
        self._board[self._rank] = rows.clone()
        self._barrier.wait()
        seen = list(self._board)
        self._barrier.wait()
        return seen

    def over_heads(self, partial):
        seen = self._all(partial)
        return sum(seen[rank] for rank in self._own)

    def of_all_replicas(self, rows):
        seen = self._all(rows)
        return torch.cat([seen[self._plan.ranks_of(replica)[0]] for replica in range(self._plan.dp)])

    def over_width(self, partial):
        return sum(self._all(partial)).chunk(self._plan.dp)[self._plan.replica_of(self._rank)]

    def of_all_heads(self, pairs):
        seen = self._all(pairs)
        return torch.cat([seen[rank] for rank in self._own])


class Group:
    """Ranks of a tiny checkpoint, each with a pool of its own, stepped as :class:`serving.cuda.groups.runner.GroupRunner` does."""

    def __init__(self, directory, tp: int, dp: int) -> None:
        spec = load_spec(directory)
        self.plan = GroupPlan(tuple(f"gpu:{rank}" for rank in range(tp * dp)), tp, dp)
        self.pools, self.ranks = [], []
        for rank in range(self.plan.ranks):
            share = self.plan.share(rank)
            own = share_spec(spec, share)
            with ShareOfWeights(open_checkpoint(directory, spec.name), share) as weights:
                attention = CardAttentionHalf(own, weights, torch.float32, CPU)
                ffn = CardFFNHalf(own, weights, torch.float32, CPU)
            self.pools.append(KVPool(800, PAGE_BYTES, [(own, "float32")], max_runs=9))
            kv = self.pools[-1].models[spec.name]
            runs = [kv.open_run() for _ in range(9)]
            for idle in (runs[0], runs[-1]):  # where idle rows are read and written
                kv.grow(idle, 1)
            for run in reversed(runs[1:-1]):
                kv.close_run(run)
            blocks = torch.arange(-(-kv.geometry.max_context_tokens // BLOCK_TOKENS))
            first_token = share.heads.uneven(spec.vocab_size).start
            self.ranks.append(CardRank(attention, ffn, kv, blocks, tp, first_token))
        self.replicas = [ReplicaKV([self.ranks[rank].kv for rank in self.plan.ranks_of(r)]) for r in range(dp)]
        self.parts = GroupParts(dp, shapes_of(LIMITS, kv.geometry.max_context_tokens, dp), LIMITS, pinned=False)

    def step(self, plans) -> list[list[int]]:
        tokens: list[list[int]] = [[] for _ in plans]
        for part in self.parts.of(plans):
            by_rank = self._run(part)
            for replica, wanted in enumerate(part.wanted):
                results = {tuple(by_rank[rank][place] for place in wanted) for rank in self.plan.ranks_of(replica)}
                assert len(results) == 1, "ranks of a replica have come apart"
                tokens[replica].extend(results.pop())
        return tokens

    def _run(self, part) -> list[list[int]]:
        board, barrier = [None] * self.plan.ranks, threading.Barrier(self.plan.ranks, timeout=60)

        @torch.inference_mode()
        def one(rank: int) -> list[int]:
            held = self.ranks[rank]
            layout = self.on_the_cpu(
                CardLayout.of(part.shape, part.numbers[self.plan.replica_of(rank)], held.blocks), held.kv
            )
            sources = part.sources if self.plan.dp > 1 else None
            try:
                return held.forward(layout, sources, MeetingRows(self.plan, rank, board, barrier)).tolist()
            except BaseException:
                barrier.abort()
                raise

        with ThreadPoolExecutor(self.plan.ranks) as threads:
            return list(threads.map(one, range(self.plan.ranks)))

    @staticmethod
    def on_the_cpu(layout: CardLayout, kv) -> CardLayout:
        """Idle rows are written to the last run's first slot, and have a token: CPU forms know no idle rows."""
        slots = layout.slots.where(layout.slots >= 0, len(kv.layers[0]) - kv.run_slots)
        return dataclasses.replace(layout, slots=slots, kv_lens=layout.kv_lens.clamp(min=1))

    def close(self) -> None:
        for rank in self.ranks:
            rank.kv.layers.clear()
        for pool in self.pools:
            pool.close()


@pytest.fixture
def group(request, tiny_checkpoints):
    architecture, tp, dp = request.param
    made = Group(tiny_checkpoints[architecture], tp, dp)
    yield tiny_checkpoints[architecture], made
    made.close()


@pytest.mark.parametrize("group", CASES, indirect=True, ids=lambda case: f"{case[0]}-tp{case[1]}-dp{case[2]}")
def test_tokens_of_all_replicas_equal_the_judge(group):
    """Prompts of odd lengths, longer than a chunk too, unevenly over the replicas; one replica is idle at first."""
    directory, group = group
    prompts = [tuple(range(3 + i, 3 + i + length)) for i, length in enumerate((45, 1, 20, 7, 33))]
    scheduler = StepScheduler(group.plan.dp, LIMITS)
    sequences = []
    for i, prompt in enumerate(prompts):
        replica = min(i // 3, group.plan.dp - 1)
        run = group.replicas[replica].open_run()
        sequences.append(Sequence(i, replica, list(prompt), len(prompt), 3 + i, run=run))
        scheduler.add(sequences[-1])
    while scheduler.live:
        plans = {}
        while plan := scheduler.next_step(lambda one: one.model not in plans):  # noqa: B023
            plans[plan.model] = plan
            for (sequence, _), tokens in zip(plan.items, plan.kv_lens, strict=True):
                group.replicas[plan.model].grow(sequence.run, tokens)
        by_replica = group.step([plans.get(replica) for replica in range(group.plan.dp)])
        for replica, plan in plans.items():
            scheduler.complete(plan, iter(by_replica[replica]))
    for sequence, prompt in zip(sequences, prompts, strict=True):
        new = sequence.tokens[len(prompt) :]
        assert new == judges.greedy_reference(directory, prompt, sequence.max_new_tokens)
        group.replicas[sequence.model].close_run(sequence.run)
    assert {pool.lender.lent_pages for pool in group.pools} == {2 * group.replicas[0].geometry.num_layers}


class PlayedRunner:
    """A :class:`serving.cuda.groups.runner.GroupRunner` whose steps are done when they are launched."""

    bytes_crossed = 0

    def __init__(self, group: Group) -> None:
        self._group, self._tokens, self.closed = group, [], False

    def launch(self, plans) -> None:
        self._tokens = self._group.step(plans)

    def done(self) -> bool:
        return True

    def result(self) -> list[list[int]]:
        return self._tokens

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize("group", [("deepseek_v2", 1, 2)], indirect=True)
def test_the_worker_serves_all_replicas_until_it_is_told_to_stop(group):
    directory, group = group
    control, tokens = BelledRing(SharedRegion(1 << 16), Bell()), Ring(SharedRegion(1 << 16))
    runner, counters = PlayedRunner(group), Counters(SharedRegion(REGION_BYTES))
    layers = group.ranks[0].attention.spec.num_layers
    models = [
        HostedModel(replica, group.ranks[replica].attention, kv, runner, replica, layers)
        for replica, kv in enumerate(group.replicas)
    ]
    pools = [(f"replica {rank}", pool) for rank, pool in enumerate(group.pools)]
    worker = CardGroupWorker([runner], [range(2)], models, pools, LIMITS, 1, control, tokens, counters, 50.0)
    prompts = {0: tuple(range(1, 30)), 1: (4, 5), 2: (6, 7, 8)}
    for request_id, prompt in prompts.items():
        control.push(encode(Submit(request_id, request_id % 2, prompt, 5, (), 0)))
    found = {request_id: [] for request_id in prompts}
    serving = threading.Thread(target=worker.run)
    serving.start()
    ended, deadline_s = 0, time.monotonic() + 60
    while ended < len(prompts) and time.monotonic() < deadline_s:
        data = tokens.pop()
        message = decode(data) if data is not None else None
        for request_id, token, last in message.items if isinstance(message, Tokens) else ():
            found[request_id].append(token)
            ended += last
    control.push(encode(Stop()))
    serving.join(30)
    assert not serving.is_alive() and runner.closed
    assert found == {name: judges.greedy_reference(directory, prompt, 5) for name, prompt in prompts.items()}
    assert 0 < counters.read()["busy_ns"]


@pytest.mark.parametrize("group", [("deepseek_v2", 1, 2), ("mixtral", 2, 1)], indirect=True)
def test_a_rank_alone_computes_the_same_shapes(group):
    _, group = group
    held = group.ranks[0]
    for shape in shapes_of(LIMITS, held.kv.geometry.max_context_tokens, group.plan.dp):
        part = group.parts.idle(shape)
        sources = part.sources if group.plan.dp > 1 else None
        with torch.inference_mode():
            layout = group.on_the_cpu(CardLayout.of(shape, part.numbers[0], held.blocks), held.kv)
            tokens = held.forward(layout, sources, AloneRows(group.plan))
        assert tokens.shape == (shape.sequences,)


@given(st.lists(st.integers(0, 3), min_size=2, max_size=4))
@settings(max_examples=30, deadline=None)
def test_idle_rows_repeat_an_active_one(decoding):
    """So that no expert is read for what they hold."""
    parts = GroupParts(len(decoding), shapes_of(LIMITS, 64, len(decoding)), LIMITS, pinned=False)
    scheduler = StepScheduler(len(decoding), LIMITS)
    run = ReplicaRun()
    for replica, count in enumerate(decoding):
        for number in range(count):
            scheduler.add(Sequence(10 * replica + number, replica, [1, 2], 2, 4, cached=1, run=run))
    plans: dict = {}
    while plan := scheduler.next_step(lambda one: one.model not in plans):
        plans[plan.model] = plan
    if not plans:
        return
    (part,) = parts.of([plans.get(replica) for replica in range(len(decoding))])
    active = {replica * part.shape.rows + row for replica, count in enumerate(decoding) for row in range(count)}
    assert set(part.sources.tolist()) == active
    assert all(part.sources[row] == row for row in active)
    assert part.wanted == tuple(list(range(count)) for count in decoding)


@given(st.lists(st.lists(st.integers(1, 45), max_size=4), min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_whatever_replicas_do_together_has_a_shape(pending):
    """Also where one decodes all that it may while another is given a prompt."""
    parts = GroupParts(len(pending), shapes_of(LIMITS, 64, len(pending)), LIMITS, pinned=False)
    plans = []
    for replica, tokens_of_each in enumerate(pending):
        scheduler = StepScheduler(len(pending), LIMITS)
        for number, tokens in enumerate(tokens_of_each):
            scheduler.add(Sequence(number, replica, [1] * 50, 50, 4, cached=50 - tokens, run=ReplicaRun()))
        plans.append(scheduler.next_step())
    made = parts.of(plans)
    for replica, plan in enumerate(plans):
        rows = sum(plan.query_lens) if plan else 0
        assert (
            sum((part.numbers[replica][2 * part.shape.rows : 3 * part.shape.rows] >= 0).sum() for part in made) == rows
        )
        assert sum(len(part.wanted[replica]) for part in made) == (len(plan.logit_rows) if plan else 0)
    assert all(part.shape.rows <= LIMITS.max_rows for part in made)


class ReplicaRun:
    """A run at the start of a pool."""

    start_slot = 0


@pytest.mark.parametrize("group", [("qwen3_moe", 2, 2)], indirect=True)
def test_growth_of_a_replica_takes_the_same_pages_on_each_of_its_cards(group):
    """The card that has fewest decides, the youngest gives way, and the other replica keeps what it has."""
    _, group = group
    counters = Counters(SharedRegion(REGION_BYTES))
    geometry = group.replicas[0].geometry
    group.pools[1].lender.lend(800 - 5 * geometry.num_layers)  # another engine's: three pages a layer are left there
    growths = []
    for replica in range(2):
        kv = group.replicas[replica]
        pages = ReplicaPages([group.pools[rank] for rank in group.plan.ranks_of(replica)], kv, counters)
        growths.append(PreemptingGrowth(2, pages, lambda _, tokens: geometry.pages(tokens, PAGE_BYTES), 4))
    growth = GroupGrowth(growths)
    long = PAGE_BYTES // geometry.token_bytes + 1  # two pages a layer
    sequences = []
    for i, (replica, tokens) in enumerate(((0, 5), (0, long), (1, 5))):
        run = group.replicas[replica].open_run()
        sequences.append(Sequence(i, replica, [1] * tokens, tokens, 2 * long, run=run))
        growth.add(sequences[-1])
    assert [growth.may_step(0.0)(sequence) for sequence in sequences] == [True, True, True]
    assert group.pools[0].lender.lent_pages == 5 * geometry.num_layers
    assert group.pools[2].lender.lent_pages == group.pools[3].lender.lent_pages == 3 * geometry.num_layers
    sequences[0].tokens += [1] * long  # it wants a page a layer more, and none is left on the second card
    assert [growth.may_step(1.0)(sequence) for sequence in sequences] == [True, False, True]
    assert growth.take_preempted() == (1,)
    assert group.pools[0].lender.lent_pages == 4 * geometry.num_layers


def test_groups_that_share_devices_are_driven_together():
    def instance(*devices: str) -> Instance:
        return Instance(None, GroupPlan(devices, 1, len(devices)), 0)

    a, b, c, d = instance("0", "1"), instance("2"), instance("3", "4"), instance("1", "3")
    assert sharing_devices([a, b, c]) == [[a], [b], [c]]
    assert sharing_devices([a, b, c, d]) == [[b], [a, c, d]]
    assert sharing_devices([]) == []
