"""A device's memory for weights: pages, and address space for every model's image, mapped while the model is there.

An image is contiguous in address space whatever pages it has, so the halves over it are built once and nothing fragments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from serving.interface import ServedModel
from serving.layers.attention_half import AttentionHalf
from serving.layers.ffn_half import FFNHalf
from serving.memory.pages import PageLender, contiguous_runs
from serving.memory.virtual import PhysicalPages, VirtualRange
from serving.residency.image import PAGE_BYTES, Extent, Placer, ShapesOnly, build_halves, image_bytes


class MappablePages(Protocol):
    """Pages that a range maps."""

    page_bytes: int

    @property
    def fd(self) -> int: ...


class ImageSpace:
    """Address space for one model's image. `units` are its stretches of bytes, by unit."""

    def __init__(self, model: ServedModel) -> None:
        self.model = model
        self.pages = pages_of_image(model)
        self._range = VirtualRange(self.pages * PAGE_BYTES)
        self.address = self._range.address
        placer = Placer(model, self.address, write=False)
        self.attention: AttentionHalf
        self.ffn: FFNHalf
        self.attention, self.ffn = build_halves(model, placer, ShapesOnly(model.spec))
        self.units: list[list[Extent]] = placer.units

    def map(self, physical: MappablePages, pages: Sequence[int]) -> None:
        """Put `pages` of `physical` under the image, in this order."""
        offset = 0
        for first, count in contiguous_runs(list(pages)):
            self._range.map(offset, physical, first, count)
            offset += count * PAGE_BYTES

    def unmap(self) -> None:
        self._range.unmap(0, self.pages * PAGE_BYTES)


def pages_of_image(model: ServedModel) -> int:
    return image_bytes(model) // PAGE_BYTES


class DeviceArena:
    """Images of `models` in at most `num_pages` pages."""

    def __init__(self, num_pages: int, models: Sequence[ServedModel]) -> None:
        self._lender = PageLender(num_pages)
        self._physical = PhysicalPages(num_pages, PAGE_BYTES)
        self.spaces = [ImageSpace(model) for model in models]
        self._lent: list[list[int]] = [[] for _ in models]

    @property
    def free_pages(self) -> int:
        return self._lender.free_pages

    def open(self, model: int) -> ImageSpace:
        """Pages under the image of `model`, whose bytes are whatever they were. Raises CapacityError where too few are free."""
        space = self.spaces[model]
        self._lent[model] = self._lender.lend(space.pages)
        space.map(self._physical, self._lent[model])
        return space

    def evict(self, model: int) -> None:
        self.spaces[model].unmap()
        self._lender.give_back(self._lent[model])
        self._lent[model] = []
