"""A device's memory for weights: pages that are there from the start, and address space for every model's image, under which
they are put while the model is there.

An image is contiguous in address space whatever pages it has, so the halves over it are built once and nothing fragments.
"""

from __future__ import annotations

from collections.abc import Sequence

from serving.interface import ServedModel
from serving.layers.attention_half import AttentionHalf
from serving.layers.ffn_half import FFNHalf
from serving.memory.movable import MovableMemory
from serving.memory.virtual import FRAME_BYTES, VirtualRange
from serving.residency.frames import FrameLender, Run
from serving.residency.image import PAGE_BYTES, Extent, Placer, ShapesOnly, build_halves, image_bytes, num_units


class ImageSpace:
    """Address space for one model's image. `units` are its stretches of bytes, by unit."""

    def __init__(self, model: ServedModel) -> None:
        self.model = model
        self.pages = pages_of_image(model)
        self._range = VirtualRange(self.pages * PAGE_BYTES, align_bytes=FRAME_BYTES)
        self.address = self._range.address
        placer = Placer(self.address, image_bytes(model), num_units(model), write=False)
        self.attention: AttentionHalf
        self.ffn: FFNHalf
        self.attention, self.ffn = build_halves(model, placer, ShapesOnly(model.spec))
        self.units: list[list[Extent]] = placer.units

    def map(self, memory: MovableMemory, runs: Sequence[Run]) -> None:
        """Put the pages `runs` of `memory` under the image, in this order."""
        address = self.address
        for first, count in runs:
            memory.lend(first, count, address)
            address += count * PAGE_BYTES

    def unmap(self, memory: MovableMemory, runs: Sequence[Run]) -> None:
        """Give the pages that :meth:`map` got back; touching the image is a fault from then on."""
        address = self.address
        for first, count in runs:
            memory.take_back(first, count, address)
            address += count * PAGE_BYTES
        self._range.unmap(0, self.pages * PAGE_BYTES)


def pages_of_image(model: ServedModel) -> int:
    return image_bytes(model) // PAGE_BYTES


class DeviceArena:
    """Images of `models` in at most `num_pages` pages."""

    def __init__(self, num_pages: int, models: Sequence[ServedModel]) -> None:
        self._lender = FrameLender(num_pages, FRAME_BYTES // PAGE_BYTES)
        self._memory = MovableMemory(num_pages, PAGE_BYTES)
        self.spaces = [ImageSpace(model) for model in models]
        self._lent: list[list[Run]] = [[] for _ in models]

    @property
    def free_pages(self) -> int:
        return self._lender.free_pages

    def open(self, model: int) -> ImageSpace:
        """Pages under the image of `model`, whose bytes are whatever they were. Raises CapacityError where too few are free."""
        space = self.spaces[model]
        self._lent[model] = self._lender.lend(space.pages)
        space.map(self._memory, self._lent[model])
        return space

    def evict(self, model: int) -> None:
        self.spaces[model].unmap(self._memory, self._lent[model])
        self._lender.give_back(self._lent[model])
        self._lent[model] = []
