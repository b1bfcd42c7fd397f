"""The KV pool of a device: physical pages shared by models of different KV geometry, each seeing its own tensors.

Address space is cheap, memory is not. Every model has a virtual range with one stretch a layer; in it every request owns a
*run*, the same slots in each layer, long enough for the longest context. Pages are mapped under a run as its tokens come
and all go back when the request ends. Because a run is contiguous, a token may straddle two pages and only the tail of the
last page of each layer is lost to rounding.

Pages that went back are free, for anybody, but stay mapped where they were until somebody is lent them: the next request in
that place finds them there. On a card that saves the driver's calls, 74 us a page of a layer, before a request's first token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain

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
    """Where one request's KV lies: `start_slot` in every layer, with pages for the first `mapped_tokens`. `columns` are those
    pages, a column being one of each layer at the same place."""

    index: int
    start_slot: int
    mapped_tokens: int = 0
    columns: list[list[int]] = field(default_factory=list)

    @property
    def num_pages(self) -> int:
        """Over all layers."""
        return sum(map(len, self.columns))


@dataclass
class _Kept:
    """Columns that are free and still mapped under a run, behind the first `at`, which it has."""

    at: int
    columns: list[list[int]]


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
        self._kept: dict[int, _Kept] = {}  # by run
        self.pages_in_use = 0

    @property
    def free_runs(self) -> int:
        return len(self._free_runs)

    def open_run(self) -> Run:
        """A run without pages, the last one that was closed. Raises CapacityError when all are taken."""
        if not self._free_runs:
            raise CapacityError(f"{self.geometry.model}: no free KV run; raise max_running")
        index = self._free_runs.pop()
        return Run(index=index, start_slot=index * self.run_slots)

    def grow(self, run: Run, tokens: int) -> int:
        """Let `run` have pages until `tokens` tokens fit; a no-op where they do. How many had to be mapped; the others still were.
        Raises CapacityError, taking none."""
        if tokens <= run.mapped_tokens:
            return 0
        if tokens > self.geometry.max_context_tokens:
            raise CapacityError(
                f"{self.geometry.model}: {tokens} tokens exceed its context of {self.geometry.max_context_tokens}"
            )
        page_bytes, num_layers = self._pool.page_bytes, self.geometry.num_layers
        wanted, before = -(-tokens * self.geometry.token_bytes // page_bytes), len(run.columns)
        lent: list[int] = []
        with self._pool.lender.deciding():  # what is free now still is below
            self._pool.lender.require((wanted - before) * num_layers)
            self._take_kept(run, wanted)
            if added := wanted - len(run.columns):
                lent = self._pool.lend(added * num_layers)
        if added:
            self._map(run, lent, added)
        run.mapped_tokens = wanted * page_bytes // self.geometry.token_bytes
        self.pages_in_use += (wanted - before) * num_layers
        return len(lent)

    def close_run(self, run: Run) -> None:
        """Give the pages of `run` back, and let another have its place."""
        self.release(run)
        self._free_runs.append(run.index)

    def release(self, run: Run) -> None:
        """Give the pages of `run` back; it stays open and can grow again."""
        if run.columns:
            behind = self._kept.pop(run.index, None)
            self._kept[run.index] = _Kept(0, run.columns + (behind.columns if behind else []))
            self.pages_in_use -= run.num_pages
            self._pool.keep(self, run.index, run.columns)
        run.columns, run.mapped_tokens = [], 0

    def unmap_kept(self, index: int, num_pages: int | None = None) -> None:
        """Unmap what is kept under run `index`: all of it, or of its last columns `num_pages` pages at least."""
        kept = self._kept[index]
        stay = 0 if num_pages is None else max(len(kept.columns) - -(-num_pages // self.geometry.num_layers), 0)
        gone, kept.columns = kept.columns[stay:], kept.columns[:stay]
        offset = index * self._run_bytes + (kept.at + stay) * self._pool.page_bytes
        for layer in range(self.geometry.num_layers):
            self._range.unmap(layer * self._layer_bytes + offset, len(gone) * self._pool.page_bytes)
        if not stay:
            del self._kept[index]
        self._pool.unmapped(gone)

    def _map(self, run: Run, lent: list[int], added: int) -> None:
        """Map `lent` under `run`, behind what it has: `added` pages of the first layer, then of the next, and so on."""
        page_bytes = self._pool.page_bytes
        first_byte = run.index * self._run_bytes + len(run.columns) * page_bytes
        for layer in range(self.geometry.num_layers):
            offset = layer * self._layer_bytes + first_byte
            for page, count in contiguous_runs(lent[layer * added : (layer + 1) * added]):
                self._range.map(offset, self._pool.physical, page, count)
                offset += count * page_bytes
        run.columns.extend(lent[column::added] for column in range(added))

    def _take_kept(self, run: Run, wanted: int) -> None:
        """Give `run` what is kept under it, up to `wanted` columns. If others have a part of that, the rest makes room for them."""
        kept = self._kept.get(run.index)
        if kept is None:
            return
        while kept.columns and len(run.columns) < wanted and self._pool.retake(kept.columns[0]):
            run.columns.append(kept.columns.pop(0))
            kept.at += 1
        if not kept.columns:
            del self._kept[run.index]
        elif len(run.columns) < wanted:
            self.unmap_kept(run.index)

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
        self._kept: dict[int, tuple[ModelKV, int]] = {}  # by free page, oldest first: the run under which it is mapped
        self.physical = memory.pages(num_pages + int(memory.anchored), page_bytes)
        self.models = {spec.name: ModelKV(spec, dtype, self, max_runs) for spec, dtype in models}

    @property
    def num_pages(self) -> int:
        return self.lender.num_pages

    def lend(self, count: int) -> list[int]:
        """`count` free pages that nothing maps any more. Raises CapacityError, lending none, when fewer are free."""
        pages = self.lender.lend(count)
        for page in pages:
            if page in self._kept:
                kv, index = self._kept[page]
                kv.unmap_kept(index)
        return pages

    def keep(self, kv: ModelKV, index: int, columns: Sequence[Sequence[int]]) -> None:
        """Have `columns` back, which stay mapped under a run of `kv` while there is no better use for them."""
        pages = list(chain.from_iterable(columns))
        self.lender.keep(pages)
        self._kept.update(dict.fromkeys(pages, (kv, index)))
        while (over := len(self._kept) - self.physical.most_kept) > 0:
            oldest, its_index = next(iter(self._kept.values()))
            oldest.unmap_kept(its_index, over)

    def retake(self, column: Sequence[int]) -> bool:
        """Lend a column that is kept, if nobody has any of it."""
        if not self.lender.take(column):
            return False
        for page in column:
            del self._kept[page]
        return True

    def unmapped(self, columns: Sequence[Sequence[int]]) -> None:
        """`columns`, which were kept, are not mapped any more."""
        pages = list(chain.from_iterable(columns))
        for page in pages:
            del self._kept[page]
        self.lender.forget(pages)
        self.physical.let_go(pages)

    def map_first_pages(self, runs: int) -> None:
        """Have the first pages mapped that the next `runs` runs of each model will need, as far as free pages go round, so that the
        requests that come first find them as later ones do."""
        opened = []
        with self.lender.deciding():
            left = min(self.lender.free_pages, self.physical.most_kept)
            for kv in [*self.models.values()] * runs:
                needed = kv.geometry.pages(1, self.page_bytes)
                if kv.free_runs and needed <= left:
                    left -= needed
                    opened.append((kv, kv.open_run()))
                    kv.grow(opened[-1][1], 1)
            for kv, run in reversed(opened):
                kv.close_run(run)

    def unmap_kept(self) -> None:
        """Unmap all that is free."""
        while self._kept:
            kv, index = next(iter(self._kept.values()))
            kv.unmap_kept(index)

    def pages_by_model(self) -> dict[str, int]:
        return {name: kv.pages_in_use for name, kv in self.models.items()}

    def close(self) -> None:
        for kv in self.models.values():
            kv.close()
        self.physical.close()
