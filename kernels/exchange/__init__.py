"""Rows exchanged between cards in one launch: posted into the memory of others, and what they posted gathered or summed.

What a group of cards that compute one model's layers needs (Megatron-LM, section 3), in the one-shot form for few rows: every
card writes its rows into the memory of each other and reads its own. The order of a sum is the order of the sources, so all
cards get the same bits. All that changes between calls lies in device memory, so calls can be captured in a graph.
"""

from __future__ import annotations

import torch

from kernels.dispatch import cuda_form
from kernels.exchange import reference as host_form
from kernels.exchange.state import TIMED_OUT, Inbox, Outbox, symmetric

__all__ = ["MAX_SPINS", "TIMED_OUT", "Inbox", "Outbox", "collect", "exchange", "post", "symmetric"]

MAX_SPINS = 20_000_000  # of about a microsecond each


def post(outbox: Outbox, x: torch.Tensor, per_part: int = 0) -> None:
    """Write `x` [T, D] into the next filling of each of the outbox's inboxes and publish it there. With `per_part` the rows are
    parts, of T rows each ([parts * T, D]), and target i is sent part i // `per_part` alone."""
    (cuda_form(__name__) if x.is_cuda else host_form).post(outbox, x, per_part)


def collect(inbox: Inbox, rows: int, width: int, total: bool, max_spins: int = MAX_SPINS) -> torch.Tensor:
    """What every source posts next, `rows` x `width` each: their sum [rows, width], added up in float32 in order of source, where
    `total`, else all of it [sources * rows, width]. After `max_spins` looks at a flag it goes on with whatever lies there,
    with `inbox.error` set to `TIMED_OUT`."""
    form = cuda_form(__name__) if inbox.slots.is_cuda else host_form
    return form.collect(inbox, rows, width, total, max_spins)


def exchange(
    outbox: Outbox, inbox: Inbox, x: torch.Tensor, total: bool, per_part: int = 0, max_spins: int = MAX_SPINS
) -> torch.Tensor:
    """`post`, then `collect` of as many rows as each target was sent, in one launch."""
    form = cuda_form(__name__) if x.is_cuda else host_form
    return form.exchange(outbox, inbox, x, total, per_part, max_spins)
