"""How every Triton kernel here is launched, so that the ahead-of-time compiler can see the very calls a run would make."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

INTERPRETED_SMS = 4  # without a card, grids that scale with it stay small


class Launch(NamedTuple):
    """One recorded kernel launch: positional arguments, then constexprs and options by name."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    meta: dict[str, Any]


_recorder: Callable[[Launch], None] | None = None


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """Launch `kernel` over `grid` on the current stream (or only note it, inside :func:`recording`)."""
    if _recorder is not None:
        _recorder(Launch(kernel, grid, args, meta))
        return
    kernel[grid](*args, **meta)


@contextlib.contextmanager
def recording():
    """Within it no kernel runs: yields the list that launches are noted in. Tensors may then be on the meta device."""
    global _recorder
    calls: list[Launch] = []
    _recorder = calls.append
    try:
        yield calls
    finally:
        _recorder = None


def compile_ahead(calls: list[Launch]) -> None:
    """Compile the kernels of recorded launches for the current CUDA device, several at a time, running none. A kernel
    that does not compile says so when it is launched."""
    import triton

    with (
        concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool,
        triton.AsyncCompileMode(pool, ignore_errors=True),
    ):
        for call in _distinct(calls):
            with contextlib.suppress(Exception):  # the front end compiles in this thread, and may refuse as well
                call.kernel.run(*call.args, grid=call.grid, warmup=True, **call.meta)


def _distinct(calls: list[Launch]) -> list[Launch]:
    """One call of each kind: layers launch the same kernels over and over, and asking for one to be compiled is not cheap."""

    def kind(argument: object) -> object:
        if isinstance(argument, torch.Tensor):
            return argument.dtype, argument.data_ptr() % 16 == 0
        return argument

    found = {(id(c.kernel), tuple(map(kind, c.args)), tuple(c.meta.items())): c for c in calls}
    return list(found.values())


@functools.cache
def num_sms(device: torch.device) -> int:
    """Multiprocessors of `device`; an H200's for meta tensors, a handful where the interpreter runs."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 132 if device.type == "meta" else INTERPRETED_SMS


@functools.cache
def multiplies_by_warp_groups(device: torch.device) -> bool:
    """Whether a product on `device` takes groups of four warps, as Hopper's do; as for an H200 off CUDA."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] == 9


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()
