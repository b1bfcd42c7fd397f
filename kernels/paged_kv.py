"""One layer's KV cache as attention kernels see it: a virtual range of token slots, and where each sequence lies in it."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class PagedKV:
    """The KV of a batch of B sequences in one layer.

    `cache` is the layer's whole virtual range, by token slot: [slots, 2, kv_heads, head_dim] for MHA/GQA (K is index 0, V
    index 1) or [slots, kv_rank + rope_dim] for MLA. Physical pages lie under the slots in use only: never read a slot that
    no sequence owns. Slot of token t of sequence b: `block_table[b, t // block_tokens] * block_tokens + t % block_tokens`.

    `run_starts[b]` is set where each sequence is one contiguous run of slots (always on the CPU, where address space is
    free): token t is then slot `run_starts[b] + t`, and attention reads `cache[start : start + length]` with no gather.
    """

    cache: torch.Tensor
    block_tokens: int
    block_table: torch.Tensor | None  # [B, max_blocks] int32
    kv_lens: torch.Tensor | None  # [B] int32, tokens in the cache once this step's are written
    run_starts: tuple[int, ...] = ()
    run_lens: tuple[int, ...] = ()  # kv_lens as host integers, beside run_starts


def sequence_tokens(kv: PagedKV, sequence: int) -> torch.Tensor:
    """The cache rows of one sequence's tokens, in order: [L, ...]. A view where runs are given, a gather elsewhere."""
    if kv.run_starts:
        start = kv.run_starts[sequence]
        return kv.cache[start : start + kv.run_lens[sequence]]
    token = torch.arange(int(kv.kv_lens[sequence]), device=kv.cache.device)
    block = kv.block_table[sequence].long()[token // kv.block_tokens]
    return kv.cache[block * kv.block_tokens + token % kv.block_tokens]
