"""Token ids of prompts. Each id is a hash of (seed, what the position belongs to, position): a request's prompt does not
depend on the requests before it, on the machine or on a library's version, and needs no memory until it is read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

INJECTED_KEYS = 1 << 30  # prompts of injected requests are drawn by numbers from here on; no trace is as long
BLOCK_TOKENS = 512  # of Mooncake's prefix hashes
_CHUNK_TOKENS = 1 << 18
_OWN, _PREFIX, _BLOCK, _CHOICE, _GROUP = range(1, 6)  # kinds of keys
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class PromptPlan:
    """What prompts are made from: see :class:`workloads.config.Prompts`."""

    kind: str = "random"
    seed: int = 0
    prefix_tokens: int = 0
    prefix_share: float = 0.0
    prefix_groups: int = 1


@dataclass(frozen=True, eq=False)
class Ragged:
    """A list of numbers a request: those of request i are `values[offsets[i]:offsets[i + 1]]`."""

    offsets: np.ndarray  # [S + 1] int64
    values: np.ndarray

    def take(self, rows: np.ndarray) -> Ragged:
        """The lists of `rows`, in that order."""
        counts = np.diff(self.offsets)[rows]
        offsets = np.concatenate(([0], counts.cumsum())).astype(np.int64)
        inner = np.arange(offsets[-1]) - np.repeat(offsets[:-1], counts)
        return Ragged(offsets, self.values[np.repeat(self.offsets[rows], counts) + inner])


def make_prompts(
    plan: PromptPlan,
    vocabularies: Sequence[int],
    model: np.ndarray,
    prompt_tokens: np.ndarray,
    hashes: Ragged | None = None,
    prompt_ids: Ragged | None = None,
    prompt_keys: np.ndarray | None = None,
) -> Iterator[tuple[int, ...]]:
    """The prompt of each request in turn, `()` where there are lengths only. Made a chunk of requests at a time."""
    vocabulary = np.asarray(vocabularies, dtype=np.uint64)
    for start, stop in _chunks(prompt_tokens):
        if plan.kind == "none":
            yield from ((),) * (stop - start)
            continue
        requests = np.arange(start, stop)
        counts = prompt_tokens[start:stop].astype(np.int64)
        ends = counts.cumsum()
        if plan.kind == "text":
            ids = prompt_ids.values[prompt_ids.offsets[start] : prompt_ids.offsets[stop]].tolist()
        else:
            owner = np.repeat(requests, counts)
            position = np.arange(ends[-1]) - np.repeat(ends - counts, counts)
            own = requests if prompt_keys is None else prompt_keys[start:stop]
            keys = _keys(plan, own, counts, owner, position, hashes)
            ids = (_mix(keys + position.astype(np.uint64) * _GOLDEN) % vocabulary[model[owner]]).tolist()
        for first, end in zip((ends - counts).tolist(), ends.tolist(), strict=True):
            yield tuple(ids[first:end])


def _chunks(prompt_tokens: np.ndarray) -> Iterator[tuple[int, int]]:
    """Spans of requests whose prompts have about `_CHUNK_TOKENS` tokens together."""
    total = prompt_tokens.cumsum(dtype=np.int64)
    start = 0
    while start < len(total):
        before = total[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(total, before + _CHUNK_TOKENS, side="right")))
        yield start, stop
        start = stop


def _keys(
    plan: PromptPlan,
    requests: np.ndarray,
    counts: np.ndarray,
    owner: np.ndarray,
    position: np.ndarray,
    hashes: Ragged | None,
) -> np.ndarray:
    """What each position [tokens] belongs to: its request, a shared prefix or a block of a recorded prefix."""
    keys = np.repeat(_key(plan.seed, _OWN, requests), counts)
    if plan.kind == "prefix":
        chosen = _key(plan.seed, _CHOICE, requests) / 2.0**64 < plan.prefix_share
        group = _key(plan.seed, _GROUP, requests) % np.uint64(plan.prefix_groups)
        shared = np.repeat(chosen, counts) & (position < plan.prefix_tokens)
        return np.where(shared, np.repeat(_key(plan.seed, _PREFIX, group), counts), keys)
    if plan.kind == "blocks":
        at = hashes.offsets[owner] + position // BLOCK_TOKENS
        recorded = at < hashes.offsets[owner + 1]
        keys[recorded] = _key(plan.seed, _BLOCK, hashes.values[at[recorded]])
    return keys


def _key(seed: int, kind: int, number: np.ndarray) -> np.ndarray:
    """A 64-bit key for each `number` of one kind."""
    base = _mix(np.array([(seed * 8 + kind) & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64))
    return _mix(base + number.astype(np.uint64) * _GOLDEN)


def _mix(value: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014): each bit of the result depends on each bit of `value`."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
