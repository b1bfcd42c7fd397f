"""The KV pool of a device: physical pages shared by models of different KV geometry, each seeing its own tensors.

Address space is cheap, memory is not. Every model has a virtual range with one stretch a layer; in it every request owns a
*run*, the same slots in each layer, long enough for the longest context. Pages are mapped under a run as its tokens come
and all go back when the request ends. Because a run is contiguous, a token may straddle two pages and only the tail of the
last page of each layer is lost to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from serving.errors import CapacityError
from serving.memory.lent import SharedPageLender
from serving.memory.pages import PageLender, contiguous_runs
from serving.memory.virtual import HOST_MEMORY, Memory
from serving.spec import MLASpec, ModelSpec


@dataclass(frozen=True)
class KVGeometry:
    """One model's KV cache in numbers; all that admission and planning need to count pages."""

    model: str
    num_layers: int
    token_bytes: int  # of one token in one layer
    max_context_tokens: int

    @classmethod
    def of(cls, spec: ModelSpec, dtype: str) -> KVGeometry:
        return cls(spec.name, spec.num_layers, spec.kv_bytes_per_token_layer(dtype), spec.max_context_tokens)

    def pages(self, tokens: int, page_bytes: int) -> int:
        """Pages that `tokens` tokens of one request occupy, over all layers."""
        return self.num_layers * -(-tokens * self.token_bytes // page_bytes)

    def tokens_in(self, pages: int, page_bytes: int) -> int:
        """The most tokens of one request that occupy no more than `pages` pages."""
        return pages // self.num_layers * page_bytes // self.token_bytes


@dataclass
class Run:
    """Where one request's KV lies: `start_slot` in every layer, with pages mapped for the first `mapped_tokens`."""

    index: int
    start_slot: int
    mapped_pages: int = 0  # in each layer
    mapped_tokens: int = 0
    pages: list[int] = field(default_factory=list)


def cache_shape(spec: ModelSpec, slots: int) -> tuple[int, ...]:
    """Shape of one layer's cache: [slots, 2, kv_heads, head_dim], or [slots, kv_rank + rope_dim] for MLA."""
    if isinstance(spec.attention, MLASpec):
        return (slots, spec.attention.kv_elements_per_token)
    return (slots, 2, spec.attention.num_kv_heads, spec.attention.head_dim)


class ModelKV:
    """One model's virtual KV range in a pool: `layers[i]` is layer i's cache tensor over all slots."""

    def __init__(self, spec: ModelSpec, dtype: str, pool: KVPool, max_runs: int) -> None:
        self.geometry = KVGeometry.of(spec, dtype)
        self._pool = pool
        page_bytes, token_bytes = pool.page_bytes, self.geometry.token_bytes
        # A run starts on a page and on a slot, so its stride is a multiple of both.
        stride_bytes = math.lcm(page_bytes, token_bytes)
        self._run_bytes = -(-self.geometry.max_context_tokens * token_bytes // stride_bytes) * stride_bytes
        anchors = int(pool.memory.anchored)  # a first run that nobody owns, so that tensors begin on a mapped page
        self._layer_bytes = self._run_bytes * (max_runs + anchors)
        self.run_slots = self._run_bytes // token_bytes
        self._range = pool.memory.reserve(self._layer_bytes * spec.num_layers)
        shape = cache_shape(spec, self.run_slots * (max_runs + anchors))
        self.layers: list[torch.Tensor] = [
            self._range.tensor(layer * self._layer_bytes, shape, getattr(torch, dtype))
            for layer in range(spec.num_layers)
        ]
        for layer in range(spec.num_layers * anchors):
            self._range.map(layer * self._layer_bytes, pool.physical, pool.num_pages, 1)  # one page for all
        self._free_runs = list(range(max_runs + anchors - 1, anchors - 1, -1))
        self.pages_in_use = 0

    def open_run(self) -> Run:
        """A run with nothing mapped yet. Raises CapacityError when all are taken."""
        if not self._free_runs:
            raise CapacityError(f"{self.geometry.model}: no free KV run; raise max_running")
        index = self._free_runs.pop()
        return Run(index=index, start_slot=index * self.run_slots)

    def grow(self, run: Run, tokens: int) -> None:
        """Map pages under `run` until `tokens` tokens fit; a no-op where they do. Raises CapacityError, mapping none."""
        if tokens <= run.mapped_tokens:
            return
        if tokens > self.geometry.max_context_tokens:
            raise CapacityError(
                f"{self.geometry.model}: {tokens} tokens exceed its context of {self.geometry.max_context_tokens}"
            )
        page_bytes = self._pool.page_bytes
        wanted = -(-tokens * self.geometry.token_bytes // page_bytes)
        added = wanted - run.mapped_pages
        lent = self._pool.lender.lend(added * self.geometry.num_layers)
        first_byte = run.index * self._run_bytes + run.mapped_pages * page_bytes
        for layer in range(self.geometry.num_layers):
            offset = layer * self._layer_bytes + first_byte
            for page, count in contiguous_runs(lent[layer * added : (layer + 1) * added]):
                self._range.map(offset, self._pool.physical, page, count)
                offset += count * page_bytes
        run.pages.extend(lent)
        run.mapped_pages = wanted
        run.mapped_tokens = wanted * page_bytes // self.geometry.token_bytes
        self.pages_in_use += len(lent)

    def close_run(self, run: Run) -> None:
        """Unmap all of `run`, give its pages back, and let another have its place."""
        self.release(run)
        self._free_runs.append(run.index)

    def release(self, run: Run) -> None:
        """Unmap all of `run` and give its pages back; it stays open and can grow again."""
        if run.mapped_pages:
            length = run.mapped_pages * self._pool.page_bytes
            for layer in range(self.geometry.num_layers):
                self._range.unmap(layer * self._layer_bytes + run.index * self._run_bytes, length)
        self._pool.physical.let_go(run.pages)  # before anybody else is lent them
        self._pool.lender.give_back(run.pages)
        self.pages_in_use -= len(run.pages)
        run.pages = []
        run.mapped_pages = run.mapped_tokens = 0

    def close(self) -> None:
        self.layers.clear()
        self._range.close()


class KVPool:
    """`num_pages` pages of `page_bytes`, lent to the runs of `models`: one page size, whatever each model's geometry. Pages
    and address space come from `memory`, the host's or a card's, which may take one page more for itself. `lender` lends
    pages that other processes borrow too; without it they are this pool's alone."""

    def __init__(
        self,
        num_pages: int,
        page_bytes: int,
        models: Sequence[tuple[ModelSpec, str]],
        max_runs: int,
        memory: Memory = HOST_MEMORY,
        lender: PageLender | SharedPageLender | None = None,
    ) -> None:
        self.page_bytes = page_bytes
        self.lender = lender or PageLender(num_pages)
        self.memory = memory
        self.physical = memory.pages(num_pages + int(memory.anchored), page_bytes)
        self.models = {spec.name: ModelKV(spec, dtype, self, max_runs) for spec, dtype in models}

    @property
    def num_pages(self) -> int:
        return self.lender.num_pages

    def pages_by_model(self) -> dict[str, int]:
        return {name: kv.pages_in_use for name, kv in self.models.items()}

    def close(self) -> None:
        for kv in self.models.values():
            kv.close()
        self.physical.close()
