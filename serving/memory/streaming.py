"""A copy past the caches: what is copied to a device's arena is not read soon, and must not push out what is computed with.

Two streams of four cache lines, a page apart, by stores that the cache does not keep: on the two cores that this was tried on as
fast as memmove of a layer (14 GB/s), and what the other core computes is held up by a third less. (One stream is 40 % faster, and
holds others up as memmove does.) Where Numba is missing, memmove copies.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

ALIGN_BYTES = 64


def copy(target: int, source: int, length: int) -> None:
    """Copy `length` bytes between addresses that are multiples of ALIGN_BYTES and do not overlap, without the interpreter
    lock."""
    if target % ALIGN_BYTES or source % ALIGN_BYTES:
        raise ValueError(f"addresses {target:#x} and {source:#x} must be multiples of {ALIGN_BYTES}")
    stream, step_bytes = prepare()
    streamed = length // step_bytes * step_bytes
    if streamed:
        stream(target, source, streamed)
    ctypes.memmove(target + streamed, source + streamed, length - streamed)


@functools.cache
def prepare() -> tuple[Callable[[int, int, int], object], int]:
    """What copies whole steps, compiled here if it is not yet, and the bytes of a step."""
    try:
        from serving.memory import streaming_code  # importing Numba takes a third of a second
    except ImportError:
        return ctypes.memmove, 1
    return streaming_code.compiled(), streaming_code.STEP_BYTES
