"""Put and wait in plain torch: what the two sides do when both run, one after the other, in one thread."""

from __future__ import annotations

import torch

from kernels.mailbox.state import TIMED_OUT, Mailbox


def put(mailbox: Mailbox, slot: int, x: torch.Tensor) -> None:
    """See :func:`kernels.mailbox.put`."""
    mailbox.filled(slot, *x.shape).copy_(x)
    mailbox.sent[slot] += 1
    mailbox.published[slot] = mailbox.sent[slot]


def wait(mailbox: Mailbox, slot: int, num_rows: int, width: int, max_spins: int = 0) -> torch.Tensor:
    """See :func:`kernels.mailbox.wait`; in one thread nothing can arrive while it waits, so it gives up at once."""
    if mailbox.published[slot] <= mailbox.taken[slot]:
        mailbox.error[0] = TIMED_OUT
    mailbox.taken[slot] += 1
    return mailbox.filled(slot, num_rows, width)
