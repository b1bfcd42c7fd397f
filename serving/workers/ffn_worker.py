"""The worker that holds weights: FFN halves of its models, computing hidden rows as they arrive in its mailboxes."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

import torch

from serving.layers.ffn_half import FFNHalf
from serving.shm.mailbox import Mailbox
from serving.shm.ring import Ring
from serving.workers.config import Bells
from serving.workers.counters import Counters
from serving.workers.doorbell import answered, ring
from serving.workers.timeline import F2A, FFN, Recorder

_SPINS_BEFORE_YIELD = 64  # longer than a crossing takes; from then on others that want this core get it
_SPINS_BEFORE_SLEEP = 20000  # about 20 ms of polling before an idle worker lets go of its core
_IDLE_SLEEP_S = 0.0001  # of a core of its own, where naps cost others nothing; mailboxes ring no bell
_LONGEST_WAIT_S = 0.01
_CONTROL_EVERY = 256  # polls between two looks at the control ring


class FFNWorker:
    """Serves `mailboxes` in turn until it is told to stop. `halves[i]` is model i as descriptors name it.

    A mailbox with bells is under host-driven control: the worker sleeps until the relay names a lane, and reports to the
    relay when it is done. Otherwise it polls every slot, and the sender finds the result by polling too.
    """

    def __init__(
        self,
        halves: Sequence[tuple[FFNHalf, int, torch.dtype]],
        mailboxes: Sequence[tuple[Mailbox, Bells | None]],
        control: Ring,
        counters: Counters,
        recorder: Recorder | None = None,
        stages: int = 4,
    ) -> None:
        self._halves = list(halves)  # half, hidden size, dtype
        self._polled = [(box, slot) for box, bells in mailboxes if bells is None for slot in range(box.shape.slots)]
        self._relayed = [(box, bells) for box, bells in mailboxes if bells is not None]
        self._control = control
        self._counters = counters
        self._recorder = recorder
        self._stages = stages

    def run(self) -> None:
        """Serve until a stop message, the only control there is."""
        with torch.inference_mode():
            if self._relayed:
                self._answer()
            else:
                self._poll()

    def _poll(self) -> None:
        polls = spins = 0
        while True:
            polls += 1
            if polls % _CONTROL_EVERY == 0 and not self._control.empty:
                return
            spins += 1
            for mailbox, slot in self._polled:
                work = mailbox.receive(slot)
                if work is not None:
                    self._serve(mailbox, slot, *work)
                    spins = 0
            if spins > _SPINS_BEFORE_SLEEP:
                time.sleep(_IDLE_SLEEP_S)
            elif spins > _SPINS_BEFORE_YIELD:
                os.sched_yield()

    def _answer(self) -> None:
        while self._control.empty:
            for mailbox, bells in self._relayed:
                for slot in answered(bells.relay_to_ffn.read_fd, _LONGEST_WAIT_S):
                    self._serve(mailbox, slot, *mailbox.receive(slot))
                    ring(bells.ffn_to_relay.write_fd, slot)

    def _serve(self, mailbox: Mailbox, slot: int, model: int, layer: int, rows: int) -> None:
        started_ns = time.monotonic_ns()
        half, hidden, dtype = self._halves[model]
        inbound, outbound = mailbox.views(slot, rows, hidden, dtype)
        result = half.forward(layer, inbound)
        computed_ns = time.monotonic_ns()
        outbound.copy_(result)
        mailbox.publish(slot)
        ended_ns = time.monotonic_ns()
        self._counters.add("busy_ns", ended_ns - started_ns)
        self._counters.add("steps", 1)
        if self._recorder is not None:
            ffn_end_ns = computed_ns if self._stages == 4 else ended_ns
            self._recorder.add(started_ns, ffn_end_ns, FFN, slot, model, layer, rows)
            if self._stages == 4:
                self._recorder.add(computed_ns, ended_ns, F2A, slot, model, layer, rows)
