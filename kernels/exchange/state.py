"""The memory of an exchange: an inbox where a card reads what others post, and an outbox that knows theirs.

Every inbox has two fillings a source, used in turn. A card may post filling n + 1 before others have read filling n, never
before they have read n - 1: it has collected filling n itself, which they posted after that. So who posts to an inbox must
collect, between two posts, what its owner posted in between; a symmetric exchange, or a question and its answer, does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

TIMED_OUT = 1  # error code of a collection that gave up
BLOCK = 1024  # elements that a program copies at a time
MAX_PROGRAMS = 32


def programs_for(slot_elements: int) -> int:
    """Programs of every launch over slots of that size: constant, as each keeps its own count of fillings."""
    return min(MAX_PROGRAMS, -(-slot_elements // BLOCK))


@dataclass(frozen=True)
class Inbox:
    """Where `sources` post, on the reader's device. Flags and counts start at 0 and only grow, one for each program of a
    launch, so that programs wait for their own share of the rows alone."""

    slots: torch.Tensor  # [2, sources, slot_elements]
    flags: torch.Tensor  # [sources, programs] int32, fillings that are complete
    taken: torch.Tensor  # [programs] int32, fillings that have been read
    error: torch.Tensor  # [1] int32, 0 or TIMED_OUT

    @classmethod
    def allocate(cls, sources: int, slot_elements: int, dtype: torch.dtype, device: torch.device | str) -> Inbox:
        """An empty inbox, of rows that together have up to `slot_elements` elements of `dtype`."""
        programs = programs_for(slot_elements)
        slots = torch.zeros(2, sources, slot_elements, dtype=dtype, device=device)
        flags, taken = (torch.zeros(n, programs, dtype=torch.int32, device=device) for n in (sources, 1))
        return cls(slots, flags, taken[0], torch.zeros(1, dtype=torch.int32, device=device))

    @property
    def sources(self) -> int:
        return self.slots.shape[1]

    def forget(self) -> None:
        """As before the first filling. Nobody may be posting to it or collecting."""
        for counted in (self.flags, self.taken, self.error):
            counted.zero_()


@dataclass(frozen=True)
class Outbox:
    """One writer's way into `inboxes`, of one size, whose source number `places[i]` it is in inbox i; the addresses lie on the
    writer's device, which must reach the memory of the others."""

    inboxes: tuple[Inbox, ...]
    places: tuple[int, ...]
    slots_at: torch.Tensor  # [targets] int64, addresses of the writer's first slot in each
    flags_at: torch.Tensor  # [targets] int64, addresses of the writer's flags in each
    sent: torch.Tensor  # [programs] int32, fillings that were posted

    @classmethod
    def into(cls, inboxes: Sequence[Inbox], places: Sequence[int], device: torch.device | str) -> Outbox:
        """Raises ValueError where the inboxes differ in shape."""
        if len({inbox.slots.shape for inbox in inboxes}) != 1:
            raise ValueError("the inboxes of one writer must have one shape")
        slots = [inbox.slots[0, place].data_ptr() for inbox, place in zip(inboxes, places, strict=True)]
        flags = [inbox.flags[place].data_ptr() for inbox, place in zip(inboxes, places, strict=True)]
        return cls(
            tuple(inboxes),
            tuple(places),
            torch.tensor(slots, dtype=torch.int64, device=device),
            torch.tensor(flags, dtype=torch.int64, device=device),
            torch.zeros(inboxes[0].flags.shape[1], dtype=torch.int32, device=device),
        )

    def forget(self) -> None:
        """As before the first filling, which its inboxes must be too."""
        self.sent.zero_()


def symmetric(
    devices: Sequence[torch.device | str], slot_elements: int, dtype: torch.dtype
) -> list[tuple[Outbox, Inbox]]:
    """An exchange in which each of `devices` posts to all, itself included: its ends, one a device."""
    inboxes = [Inbox.allocate(len(devices), slot_elements, dtype, device) for device in devices]
    return [
        (Outbox.into(inboxes, [member] * len(devices), device), inboxes[member])
        for member, device in enumerate(devices)
    ]
