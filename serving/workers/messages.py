"""Messages between the host and a model worker, as they lie in the rings."""

from __future__ import annotations

import pickle
from typing import NamedTuple


class Submit(NamedTuple):
    """Host to worker: an admitted request. Ids at which generation ends are empty when end-of-sequence is ignored."""

    request_id: int
    model: int
    prompt: tuple[int, ...]
    max_new_tokens: int
    stop_ids: tuple[int, ...]
    since_ns: int = 0  # when it was submitted


class Cancel(NamedTuple):
    """Host to worker: nobody waits for this request any more. It ends with its next token; one that has ended is no error."""

    request_id: int
    model: int


class Stop(NamedTuple):
    """Host to worker: drop everything and exit."""


class Tokens(NamedTuple):
    """Worker to host: one step's tokens, as (request id, token, whether it was the last)."""

    time_ns: int
    items: tuple[tuple[int, int, bool], ...]


class PoolUse(NamedTuple):
    """Worker to host: pages in use in each pool, by model name; `used_bytes` is what tokens fill of them, in all pools, or -1
    where that is not counted."""

    time_ns: int
    pages: tuple[tuple[str, dict[str, int]], ...]
    used_bytes: int = -1


class Preempted(NamedTuple):
    """Worker to host: requests that lost their KV and will be computed again."""

    time_ns: int
    request_ids: tuple[int, ...]


class Expired(NamedTuple):
    """Worker to host: requests that waited on the device past their deadline; nothing of them was computed."""

    time_ns: int
    request_ids: tuple[int, ...]


def encode(message: Submit | Cancel | Stop | Tokens | PoolUse | Preempted | Expired) -> bytes:
    return pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)


def decode(data: bytes) -> Submit | Cancel | Stop | Tokens | PoolUse | Preempted | Expired:
    return pickle.loads(data)
