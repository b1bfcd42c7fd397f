"""A card's form of :mod:`serving.memory.virtual`: created pages in a pool, address space that they are mapped into.

Creating a page costs more than mapping one, so a pool's pages are created when it opens, or, where engines of several processes
share them, as they are needed, with some kept ready.
"""

from __future__ import annotations

import math

import torch

from serving.cuda import driver
from serving.errors import UserError

_MOST_SPARE_PAGES = 64  # 128 MiB; what a sequence of 64 layers grows by at once
_MOST_KEPT_PAGES = 192  # 384 MiB; what two or three requests of a few hundred tokens leave behind


class PhysicalPages:
    """`num_pages` pages of `page_bytes` of a card's memory, created from the start."""

    _on_demand = False

    def __init__(self, num_pages: int, page_bytes: int, device: torch.device) -> None:
        torch.cuda.set_device(device)
        torch.zeros(1, device=device)  # the driver's calls need a current context
        smallest = driver.granularity_bytes(device.index)
        if page_bytes <= 0 or page_bytes % smallest:
            raise UserError(f"KV page of {page_bytes} bytes is not a multiple of {device}'s {smallest}")
        self.num_pages = self.most_kept = num_pages  # a free page that stays mapped costs nothing
        self.page_bytes, self._index = page_bytes, device.index
        self._handles: dict[int, int] = {}  # by page
        try:
            for page in range(0 if self._on_demand else num_pages):
                self.handle(page)
        except BaseException:
            self.close()
            raise

    def handle(self, page: int) -> int:
        """What the driver knows `page` by. Raises CapacityError where it must be created and the card has no room."""
        if page not in self._handles:
            self._handles[page] = driver.create(self._index, self.page_bytes)
        return self._handles[page]

    def let_go(self, pages: list[int]) -> None:
        """Nothing maps `pages` any more. They stay created."""

    def close(self) -> None:
        while self._handles:
            driver.release(self._handles.popitem()[1])


class LentPages(PhysicalPages):
    """Pages that a ledger lends to engines of several processes. Memory of one process is not seen by another, so each creates what
    it maps, and destroys what it lets go of but for `most_spare` pages. As kvcached's engines do, it has some ready beside: up to
    `most_kept` that a request has left stay mapped for the next one. The ledger bounds what requests have by the device's budget;
    spare and kept pages lie beyond it, in what the card has more."""

    _on_demand = True

    def __init__(
        self,
        num_pages: int,
        page_bytes: int,
        device: torch.device,
        most_spare: int = _MOST_SPARE_PAGES,
        most_kept: int = _MOST_KEPT_PAGES,
    ) -> None:
        self._spare: list[int] = []  # handles
        self._most_spare = most_spare
        super().__init__(num_pages, page_bytes, device)
        self.most_kept = most_kept

    def handle(self, page: int) -> int:
        if page not in self._handles and self._spare:
            self._handles[page] = self._spare.pop()
        return super().handle(page)

    def let_go(self, pages: list[int]) -> None:
        """Nothing maps `pages` any more: their memory is spare, or goes."""
        for page in pages:
            handle = self._handles.pop(page)
            if len(self._spare) < self._most_spare:
                self._spare.append(handle)
            else:
                driver.release(handle)

    def close(self) -> None:
        super().close()
        while self._spare:
            driver.release(self._spare.pop())


class VirtualRange:
    """`length_bytes` of a card's address space. Offsets are multiples of the page size."""

    def __init__(self, length_bytes: int, device: torch.device) -> None:
        unit = driver.GRANULARITY_BYTES
        self.length_bytes = -(-length_bytes // unit) * unit
        self._device = device
        self._address = driver.reserve(self.length_bytes)
        self._mapped: set[tuple[int, int]] = set()  # (offset, bytes) of each mapping

    def map(self, offset_bytes: int, physical: PhysicalPages, first_page: int, count: int) -> None:
        """Put pages `first_page`.. at `offset_bytes`, readable and writable by the card."""
        size = physical.page_bytes
        for page in range(count):
            offset = offset_bytes + page * size
            driver.map_memory(self._address + offset, size, physical.handle(first_page + page))
            self._mapped.add((offset, size))
        driver.allow(self._device.index, self._address + offset_bytes, count * size)

    def unmap(self, offset_bytes: int, length_bytes: int) -> None:
        """Take the pages in [offset, offset + length) away. No work that reads them may be under way."""
        driver.unmap(self._address + offset_bytes, length_bytes)
        self._mapped = {entry for entry in self._mapped if not offset_bytes <= entry[0] < offset_bytes + length_bytes}

    def tensor(self, offset_bytes: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor over [offset, ...) of the range, mapped or not. It must not outlive the range."""
        length = math.prod(shape) * dtype.itemsize
        if offset_bytes + length > self.length_bytes:
            raise ValueError("tensor exceeds the virtual range")
        storage = torch._C._construct_storage_from_data_pointer(self._address + offset_bytes, self._device, length)
        return torch.empty(0, dtype=dtype, device=self._device).set_(storage, 0, shape)

    def close(self) -> None:
        """Unmap what is left and release the address space. Tensors over it must be gone."""
        if self._address:
            for offset, size in self._mapped:
                driver.unmap(self._address + offset, size)
            driver.free_address(self._address, self.length_bytes)
            self._address = 0


class CardMemory:
    """Where a KV pool on `device` gets pages and address space. Triton asks the driver about every pointer that it is given,
    and the driver knows mapped addresses only. Pages that are `lent` are also other processes'."""

    anchored = True

    def __init__(self, device: torch.device, lent: bool = False) -> None:
        self._device, self._pages = device, LentPages if lent else PhysicalPages

    def pages(self, num_pages: int, page_bytes: int) -> PhysicalPages:
        return self._pages(num_pages, page_bytes, self._device)

    def reserve(self, length_bytes: int) -> VirtualRange:
        return VirtualRange(length_bytes, self._device)
