"""Post and collect in plain torch: what several sides do when all run, one after the other, in one thread."""

from __future__ import annotations

import torch

from kernels.exchange.state import TIMED_OUT, Inbox, Outbox


def post(outbox: Outbox, x: torch.Tensor, per_part: int = 0) -> None:
    """See :func:`kernels.exchange.post`."""
    turn = (int(outbox.sent[0]) + 1) % 2
    outbox.sent.add_(1)
    parts = x.chunk(len(outbox.inboxes) // per_part) if per_part else [x]
    for target, (inbox, place) in enumerate(zip(outbox.inboxes, outbox.places, strict=True)):
        part = parts[target // per_part if per_part else 0]
        inbox.slots[turn, place, : part.numel()].view(part.shape).copy_(part)
        inbox.flags[place].copy_(outbox.sent)


def collect(inbox: Inbox, rows: int, width: int, total: bool, max_spins: int = 0) -> torch.Tensor:
    """See :func:`kernels.exchange.collect`; in one thread nothing can arrive while it waits, so it gives up at once."""
    inbox.taken.add_(1)
    if bool((inbox.flags < inbox.taken).any()):
        inbox.error[0] = TIMED_OUT
    posted = inbox.slots[int(inbox.taken[0]) % 2, :, : rows * width].view(inbox.sources, rows, width)
    if not total:
        return posted.reshape(inbox.sources * rows, width).clone()
    added = posted[0].float()
    for source in posted[1:]:
        added = added + source.float()
    return added.to(posted.dtype)


def exchange(
    outbox: Outbox, inbox: Inbox, x: torch.Tensor, total: bool, per_part: int = 0, max_spins: int = 0
) -> torch.Tensor:
    """See :func:`kernels.exchange.exchange`."""
    post(outbox, x, per_part)
    return collect(inbox, x.shape[0] * per_part // len(outbox.inboxes) if per_part else x.shape[0], x.shape[1], total)
