"""Hidden rows handed from one device to another through memory: put publishes, wait polls, and no host is involved.

Both are kernels that take every changing number from device memory, so they can be captured in a graph and replayed.
"""

from __future__ import annotations

import torch

from kernels.dispatch import cuda_form
from kernels.mailbox import reference as host_form
from kernels.mailbox.state import TIMED_OUT, Mailbox

__all__ = ["MAX_SPINS", "TIMED_OUT", "Mailbox", "put", "wait"]

MAX_SPINS = 20_000_000  # of about a microsecond each


def put(mailbox: Mailbox, slot: int, x: torch.Tensor) -> None:
    """Write `x` [T, D] into `slot` and publish its next sequence number once every row is there."""
    (cuda_form(__name__) if x.is_cuda else host_form).put(mailbox, slot, x)


def wait(mailbox: Mailbox, slot: int, num_rows: int, width: int, max_spins: int = MAX_SPINS) -> torch.Tensor:
    """A view of the slot's rows [num_rows, width], to be read by later work of this stream: that work starts when the
    next filling is published. After `max_spins` looks it starts anyway, with `mailbox.error` set to `TIMED_OUT`."""
    form = cuda_form(__name__) if mailbox.rows.is_cuda else host_form
    return form.wait(mailbox, slot, num_rows, width, max_spins)
