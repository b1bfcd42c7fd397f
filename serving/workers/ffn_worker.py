"""The worker that holds weights: FFN halves of its models, computing hidden rows as they arrive in its mailboxes."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from serving.layers.ffn_half import FFNHalf
from serving.shm.mailbox import Mailbox
from serving.shm.ring import Ring
from serving.workers.counters import Counters

_SPINS_BEFORE_SLEEP = 20000  # about 20 ms of polling before an idle worker lets go of its core
_IDLE_SLEEP_S = 0.0001
_CONTROL_EVERY = 256  # polls between two looks at the control ring


class FFNWorker:
    """Serves `mailboxes` in turn until it is told to stop. `halves[i]` is model i as descriptors name it."""

    def __init__(
        self,
        halves: Sequence[tuple[FFNHalf, int, torch.dtype]],
        mailboxes: Sequence[Mailbox],
        control: Ring,
        counters: Counters,
    ) -> None:
        self._halves = list(halves)  # half, hidden size, dtype
        self._slots = [(mailbox, slot) for mailbox in mailboxes for slot in range(mailbox.shape.slots)]
        self._control = control
        self._counters = counters

    def run(self) -> None:
        """Poll every slot in turn; a stop message is the only control there is."""
        polls = spins = 0
        with torch.inference_mode():
            while True:
                polls += 1
                if polls % _CONTROL_EVERY == 0 and not self._control.empty:
                    return
                spins += 1
                for mailbox, slot in self._slots:
                    work = mailbox.receive(slot)
                    if work is not None:
                        self._serve(mailbox, slot, *work)
                        spins = 0
                if spins > _SPINS_BEFORE_SLEEP:
                    time.sleep(_IDLE_SLEEP_S)

    def _serve(self, mailbox: Mailbox, slot: int, model: int, layer: int, rows: int) -> None:
        started_ns = time.monotonic_ns()
        half, hidden, dtype = self._halves[model]
        inbound, outbound = mailbox.views(slot, rows, hidden, dtype)
        half.forward(layer, inbound, out=outbound)
        mailbox.publish(slot)
        self._counters.add("busy_ns", time.monotonic_ns() - started_ns)
        self._counters.add("steps", 1)
