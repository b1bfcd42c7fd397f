"""KV that waits in host memory: a sequence that may not run gives its pages back and gets its KV into new ones later.

Under every layer a run is contiguous, so a sequence is one copy a layer, straight between its cache and its place in host
memory. The caller decides who goes and when; nothing here knows a schedule.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch

from serving.errors import CapacityError
from serving.memory.budget import format_bytes
from serving.memory.kv_pool import ModelKV, Run


class HostKV:
    """KV of sequences, by key, in at most `capacity_bytes` of host memory, pinned where a card copies it."""

    def __init__(self, capacity_bytes: int, pinned: bool = False) -> None:
        self.capacity_bytes, self.used_bytes = capacity_bytes, 0
        self._pinned = pinned
        self._saved: dict[Hashable, torch.Tensor] = {}  # [L, tokens, ...]

    def __contains__(self, key: Hashable) -> bool:
        return key in self._saved

    def fits(self, kv: ModelKV, tokens: int) -> bool:
        return self.used_bytes + saved_bytes(kv, tokens) <= self.capacity_bytes

    def save(self, key: Hashable, kv: ModelKV, run: Run, tokens: int) -> int:
        """Copy the first `tokens` tokens of `run` to host memory and give its pages back; the run itself stays open. Returns
        the bytes copied. Raises CapacityError, changing nothing, where host memory is full."""
        count_bytes = saved_bytes(kv, tokens)
        if self.used_bytes + count_bytes > self.capacity_bytes:
            raise CapacityError(
                f"{kv.geometry.model}: KV of {tokens} tokens is {format_bytes(count_bytes)}, of {format_bytes(self.capacity_bytes)} "
                f"in host memory {format_bytes(self.capacity_bytes - self.used_bytes)} are free"
            )
        first = kv.layers[0]
        held = torch.empty(len(kv.layers), tokens, *first.shape[1:], dtype=first.dtype, pin_memory=self._pinned)
        for saved, layer in zip(held, kv.layers, strict=True):
            saved.copy_(layer[run.start_slot : run.start_slot + tokens])
        self._saved[key] = held
        self.used_bytes += count_bytes
        kv.release(run)
        return count_bytes

    def restore(self, key: Hashable, kv: ModelKV, run: Run) -> int:
        """Map pages under `run` and copy back what was saved. Returns the bytes copied. Raises CapacityError, changing
        nothing, where the pool has too few pages."""
        held = self._saved[key]
        tokens = held.shape[1]
        kv.grow(run, tokens)
        for saved, layer in zip(held, kv.layers, strict=True):
            layer[run.start_slot : run.start_slot + tokens].copy_(saved)
        self.drop(key)
        return held.nbytes

    def drop(self, key: Hashable) -> None:
        """Forget what was saved; a no-op where nothing was."""
        held = self._saved.pop(key, None)
        if held is not None:
            self.used_bytes -= held.nbytes


def saved_bytes(kv: ModelKV, tokens: int) -> int:
    """Host memory that `tokens` tokens of one sequence take."""
    return tokens * kv.geometry.token_bytes * kv.geometry.num_layers
