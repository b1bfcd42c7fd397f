"""What a step frees, the next one takes again: glibc is told to keep it instead of giving it back to the system."""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # parameters of mallopt, malloc.h
_KEEP_BYTES = 1 << 30
_LARGEST_BLOCK_BYTES = 32 << 20  # the most that glibc accepts


def keep_freed_memory() -> None:
    """Give back what is free now, and from now on keep what becomes free, at most 1 GiB. Else activations of a prompt of more than
    some 60 tokens are new pages of the system at every step, thousands of faults. Does nothing where malloc is not glibc's."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)  # what loading left
        libc.mallopt(_MMAP_THRESHOLD, _LARGEST_BLOCK_BYTES)
        libc.mallopt(_TRIM_THRESHOLD, _KEEP_BYTES)
