"""The worker of a device that serves shares of models: it takes requests, moves every seat on in turn, and reports.

It waits for nothing: a seat whose group is not ready is passed over. Polling without result it first spins, then offers its
core to whoever shares it, then sleeps until a message comes, so that more ranks than cores make progress.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence as Seq

import torch

from serving.memory.kv_pool import KVPool
from serving.shm.ring import BelledRing, Ring
from serving.workers.counters import Counters
from serving.workers.group_member import GroupMember
from serving.workers.messages import Cancel, PoolUse, Stop, Tokens, decode, encode
from serving.workers.model_worker import LONGEST_IDLE_S

_SPINS_BEFORE_YIELD = 200
_SPINS_BEFORE_SLEEP = 4000
_LOOK_S = 0.0003  # how often a worker looks for orders of other workers, which ring no bell


class GroupWorker:
    """Runs `members` until it is told to stop. `targets[i]` is the (member, replica) of the host's model number i."""

    def __init__(
        self,
        members: Seq[GroupMember],
        pools: Seq[tuple[str, KVPool]],
        targets: Seq[tuple[int, int]],
        control: BelledRing,
        tokens: Ring,
        counters: Counters,
        sample_interval_ms: float,
    ) -> None:
        self._members, self._pools, self._targets = list(members), list(pools), list(targets)
        self._control, self._tokens, self._counters = control, tokens, counters
        self._sample_interval_ns = int(sample_interval_ms * 1e6)
        self._next_sample_ns = 0
        self._follows = any(member.follows for member in self._members)
        self._stopping = False

    def run(self) -> None:
        """Serve until a Stop message."""
        spins = 0
        with torch.inference_mode():
            while not self._stopping:
                started_ns = time.monotonic_ns()
                if self._poll():
                    self._counters.add("busy_ns", time.monotonic_ns() - started_ns)
                    spins = 0
                    continue
                spins += 1
                self._rest(spins)

    def _poll(self) -> bool:
        progressed = self._take_control() if not self._control.empty else False
        for member in self._members:
            if not member.poll():
                continue
            progressed = True
            if not member.in_step:
                self._report_step(member)
        return progressed

    def _rest(self, spins: int) -> None:
        if spins < _SPINS_BEFORE_YIELD:
            return
        in_step = any(member.in_step for member in self._members)
        if spins < _SPINS_BEFORE_SLEEP or in_step:
            os.sched_yield()
        else:
            self._control.wait(_LOOK_S if self._follows else LONGEST_IDLE_S)

    def _take_control(self) -> bool:
        while (data := self._control.pop()) is not None:
            message = decode(data)
            if isinstance(message, Stop):
                self._stopping = True
            else:
                member, replica = self._targets[message.model]
                if isinstance(message, Cancel):
                    self._members[member].cancel(message.request_id, replica)
                else:
                    self._members[member].submit(message, replica)
        return True

    # -- reports -------------------------------------------------------------------------------------------------------
    def _report_step(self, member: GroupMember) -> None:
        now_ns = time.monotonic_ns()
        self._counters.add("steps", 1)
        self._counters.set("bytes_crossed", sum(m.bytes_posted for m in self._members))
        produced = member.take_produced()
        if produced:
            self._report(Tokens(now_ns, tuple(produced)))
        idle = not any(pool.lender.lent_pages for _, pool in self._pools)
        if now_ns >= self._next_sample_ns or idle:
            self._next_sample_ns = now_ns + self._sample_interval_ns
            self._report(PoolUse(now_ns, tuple((name, pool.pages_by_model()) for name, pool in self._pools)))

    def _report(self, message: Tokens | PoolUse) -> None:
        data = encode(message)
        while not self._tokens.push(data):  # the host is behind; losing a token is no choice
            time.sleep(_LOOK_S)
