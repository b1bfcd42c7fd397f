"""Models that come and go on a card: images in an arena of pages, pinned copies of them in host memory, and loads unit by unit
on a stream of their own.

An image keeps its address whatever pages lie under it, so graphs are captured once and hold however often it comes back. The
layers of a model that is being loaded may be launched at once: each waits on the card for its unit's event, not the host.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from serving.cuda.layers import CardAttentionHalf, CardFFNHalf
from serving.cuda.memory import LentPages, PhysicalPages, VirtualRange
from serving.errors import CapacityError
from serving.interface import ServedModel
from serving.memory.budget import format_bytes
from serving.memory.pages import PageLender, contiguous_runs
from serving.residency.image import CARD_FRAME_BYTES, Extent, num_units, placed_bytes
from serving.residency.loader import Loaded

_ALIGN_BYTES = 256
_LOOK_AGAIN_S = 2e-5


class CardImage:
    """One model's weights as a stretch of a card's address space. `units` are its stretches of bytes, by unit; `host` is their
    copy in pinned host memory."""

    def __init__(self, model: ServedModel, device: torch.device) -> None:
        self.model = model
        self.frames = placed_bytes(model, "cuda") // CARD_FRAME_BYTES
        self.units: list[list[Extent]] = [[] for _ in range(num_units(model))]
        self._used_bytes = 0
        self._device = device
        self._range = VirtualRange(self.frames * CARD_FRAME_BYTES, device)
        self.bytes = self._range.tensor(0, (self.frames * CARD_FRAME_BYTES,), torch.uint8)
        self.host: torch.Tensor
        self.attention: CardAttentionHalf
        self.ffn: CardFFNHalf

    @property
    def used_bytes(self) -> int:
        return self._used_bytes

    def build(self, weights) -> None:
        """Put the halves of `weights` there, whose pages are mapped, and copy all to host memory. Raises CapacityError where
        that cannot be pinned."""
        dtype = getattr(torch, self.model.dtype)
        with weights:
            self.attention = CardAttentionHalf(self.model.spec, weights, dtype, self._device, self._keep)
            self.ffn = CardFFNHalf(self.model.spec, weights, dtype, self._device, keep=self._keep)
        self.host = torch.empty(self._used_bytes, dtype=torch.uint8)
        failed = int(torch.cuda.cudart().cudaHostRegister(self.host.data_ptr(), self._used_bytes, 0))
        if failed:
            raise CapacityError(
                f"{self.model.name}: {format_bytes(self._used_bytes)} of host memory could not be pinned (CUDA error {failed})"
            )
        self.host.copy_(self.bytes[: self._used_bytes])
        torch.cuda.empty_cache()  # what loading took beside the image is for whoever else is on the card

    def _keep(self, unit: int, tensor: torch.Tensor) -> torch.Tensor:
        start = -(-self._used_bytes // _ALIGN_BYTES) * _ALIGN_BYTES
        self._used_bytes = start + tensor.nbytes
        if self._used_bytes > len(self.bytes):
            raise RuntimeError(f"an image of {len(self.bytes)} bytes was planned and is too small")
        extents = self.units[unit]
        if extents and start - sum(extents[-1]) < _ALIGN_BYTES:
            extents[-1] = (extents[-1][0], self._used_bytes - extents[-1][0])
        else:
            extents.append((start, tensor.nbytes))
        return self._range.tensor(start, tuple(tensor.shape), tensor.dtype).copy_(tensor)

    def map(self, physical: PhysicalPages, frames: list[int]) -> None:
        offset = 0
        for first, count in contiguous_runs(frames):
            self._range.map(offset, physical, first, count)
            offset += count * CARD_FRAME_BYTES

    def unmap(self) -> None:
        self._range.unmap(0, self.frames * CARD_FRAME_BYTES)


class CardArena:
    """Images of `models` in `num_frames` pages of a card, which are there from the start, or, if not `kept`, while a model has
    them."""

    def __init__(self, num_frames: int, models: Sequence[ServedModel], device: torch.device, kept: bool = True) -> None:
        self._lender = PageLender(num_frames)
        self._physical = (
            PhysicalPages(num_frames, CARD_FRAME_BYTES, device)
            if kept
            else LentPages(num_frames, CARD_FRAME_BYTES, device, most_spare=0)
        )
        self.images = [CardImage(model, device) for model in models]
        self._lent: list[list[int]] = [[] for _ in models]

    def open(self, model: int) -> CardImage:
        """Pages under the image of `model`, whose bytes are whatever they were. Raises CapacityError where too few are free."""
        image = self.images[model]
        self._lent[model] = self._lender.lend(image.frames)
        image.map(self._physical, self._lent[model])
        return image

    def evict(self, model: int) -> None:
        """Take the pages away. No step of the model may be under way."""
        self.images[model].unmap()
        self._physical.let_go(self._lent[model])
        self._lender.give_back(self._lent[model])
        self._lent[model] = []


class CardLoader:
    """Copies one model at a time from pinned memory. `units[model]` says how many of its units are there, as of the last poll;
    :meth:`arriving` is what a step launched before that must wait for."""

    def __init__(self, arena: CardArena, units: list[int], device: torch.device) -> None:
        self._arena, self._units = arena, units
        self._stream = torch.cuda.Stream(device)
        self._events: list[torch.cuda.Event] = []
        self._model: int | None = None
        self._started_ns = 0
        self.busy = False

    def start(self, model: int) -> None:
        """Put all copies of `model`, which has no pages yet, on the stream."""
        self._started_ns = time.monotonic_ns()
        image = self._arena.open(model)
        self._events = []
        with torch.cuda.stream(self._stream):
            for extents in image.units:
                for start, length in extents:
                    image.bytes[start : start + length].copy_(image.host[start : start + length], non_blocking=True)
                self._events.append(torch.cuda.Event())
                self._events[-1].record(self._stream)
        self._model, self.busy = model, True
        self._units[model] = 0

    def poll(self) -> Loaded | None:
        """The load that has ended since, if one has."""
        if self._model is None:
            return None
        model = self._model
        there = self._units[model]
        while there < len(self._events) and self._events[there].query():
            there += 1
        self._units[model] = there
        if there < len(self._events):
            return None
        self._model, self.busy = None, False
        return Loaded(model, self._arena.images[model].used_bytes, time.monotonic_ns() - self._started_ns, 0)

    def wait(self, longest_s: float) -> None:
        """Sleep for a moment: what ends on a card is looked for, not told."""
        time.sleep(min(longest_s, _LOOK_AGAIN_S))

    def load_now(self, model: int) -> Loaded:
        """Load `model` and wait for it."""
        self.start(model)
        return self.finish()

    def finish(self) -> Loaded | None:
        """Wait for the load that is under way, if one is."""
        while self.busy:
            if (done := self.poll()) is not None:
                return done
            self.wait(_LOOK_AGAIN_S)
        return None

    def arriving(self, model: int) -> list[torch.cuda.Event] | None:
        """An event a unit where `model` is being loaded."""
        return self._events if model == self._model else None

    @contextmanager
    def present(self, model: int) -> Iterator[None]:
        """Within it the weights of `model`, which is not there, are."""
        self.load_now(model)
        try:
            yield
        finally:
            torch.cuda.synchronize()
            self._arena.evict(model)
            self._units[model] = 0
