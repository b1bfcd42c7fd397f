"""Host-driven control: the third process that hands over every stage of every lane.

Serving systems without lowered control have a host that launches each stage and waits for it. Here the data path stays as
it is, rows in a mailbox, and only who finds whom changes: attention tells the relay, the relay starts the FFN, the FFN tells
the relay, the relay starts attention. The ablation (paper, Table 3) measures exactly that difference.
"""

from __future__ import annotations

import os
import select
from collections.abc import Sequence

from serving.shm.ring import Ring
from serving.workers.config import Bells
from serving.workers.counters import Counters

_LONGEST_WAIT_MS = 20


class RelayWorker:
    """Forwards doorbells between the two sides of each mailbox until it is told to stop."""

    def __init__(self, bells: Sequence[Bells], control: Ring, counters: Counters) -> None:
        self._routes = {
            read_fd: write_fd
            for bell in bells
            for read_fd, write_fd in (
                (bell.attention_to_relay.read_fd, bell.relay_to_ffn.write_fd),
                (bell.ffn_to_relay.read_fd, bell.relay_to_attention.write_fd),
            )
        }
        self._control = control
        self._counters = counters

    def run(self) -> None:
        """Sleep until a side reports, then start the other one, a stage at a time."""
        poll = select.poll()
        for fd in self._routes:
            poll.register(fd, select.POLLIN)
        while self._control.empty:
            for fd, _ in poll.poll(_LONGEST_WAIT_MS):
                lanes = os.read(fd, 64)
                os.write(self._routes[fd], lanes)
                self._counters.add("steps", len(lanes))
