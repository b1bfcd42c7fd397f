"""What the leader of a group tells its followers, through a ring each: accepted and cancelled sequences, and the steps to take.

Rank 0 schedules for every replica. Followers keep the sequences of their replica and compute the same tokens, so an order
names sequences and row counts and nothing that can be derived.
"""

from __future__ import annotations

import pickle
from typing import NamedTuple


class Accept(NamedTuple):
    """A sequence that the follower's replica serves from now on."""

    request_id: int
    prompt: tuple[int, ...]
    max_new_tokens: int
    stop_ids: tuple[int, ...]


class Cancelled(NamedTuple):
    """A sequence that ends with its next token."""

    request_id: int


class Step(NamedTuple):
    """One step of the group: by replica, its (request id, rows) and how many of its rows get a new token."""

    items: tuple[tuple[tuple[int, int], ...], ...]
    wanted: tuple[int, ...]


def encode(order: Accept | Cancelled | Step) -> bytes:
    return pickle.dumps(order, protocol=pickle.HIGHEST_PROTOCOL)


def decode(data: bytes) -> Accept | Cancelled | Step:
    return pickle.loads(data)
