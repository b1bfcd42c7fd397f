"""A worker's counters, in shared memory: the host reads them at any time, even after the worker died."""

from __future__ import annotations

from serving.interface import SWITCH_PARTS
from serving.shm.region import SharedRegion

_NAMES = (
    *("busy_ns", "bytes_crossed", "steps", "pages_mapped", "mapping_ns", "mapped_ahead", "preemptions"),
    *("swaps", "loaded_bytes", "kv_moved_bytes", "cache_misses", *(f"switch_{part}_ns" for part in SWITCH_PARTS)),
)
REGION_BYTES = 4096


class Counters:
    """Named 64-bit words. The worker adds, the host reads."""

    def __init__(self, region: SharedRegion) -> None:
        self._words = region.words(0, len(_NAMES))

    def add(self, name: str, amount: int) -> None:
        self._words[_INDEX[name]] += amount

    def set(self, name: str, value: int) -> None:
        self._words[_INDEX[name]] = value

    def read(self) -> dict[str, int]:
        return dict(zip(_NAMES, self._words, strict=True))

    def release(self) -> None:
        self._words.release()


_INDEX = {name: index for index, name in enumerate(_NAMES)}
