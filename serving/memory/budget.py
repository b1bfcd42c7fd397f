"""The ledger of one device's memory. Weights and KV are charged to it before they exist; nothing else may hold them."""

from __future__ import annotations

from serving.errors import CapacityError


def format_bytes(count: float) -> str:
    """`count` with a binary unit, for messages: 1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


class MemoryBudget:
    """What a device of `capacity_bytes` holds, by purpose. Charging beyond the capacity raises CapacityError."""

    def __init__(self, device: str, capacity_bytes: int) -> None:
        self.device = device
        self.capacity_bytes = capacity_bytes
        self._charged_bytes: dict[str, int] = {}

    @property
    def used_bytes(self) -> int:
        return sum(self._charged_bytes.values())

    @property
    def free_bytes(self) -> int:
        return self.capacity_bytes - self.used_bytes

    def charge(self, purpose: str, count_bytes: int) -> None:
        """Take `count_bytes` for `purpose` (added to what it holds already)."""
        if count_bytes > self.free_bytes:
            missing_bytes = count_bytes - self.free_bytes
            raise CapacityError(
                f"{self.device}: {purpose} needs {count_bytes} bytes but {self.free_bytes} of {self.capacity_bytes} are free; "
                f"{missing_bytes} bytes ({format_bytes(missing_bytes)}) are missing"
            )
        self._charged_bytes[purpose] = self._charged_bytes.get(purpose, 0) + count_bytes

    def release(self, purpose: str) -> int:
        """Give back all that `purpose` holds; returns the bytes."""
        return self._charged_bytes.pop(purpose, 0)

    def by_purpose(self) -> dict[str, int]:
        return dict(self._charged_bytes)
