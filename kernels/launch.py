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


_recorder: Callable[[Launch], object] | None = None


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """Launch `kernel` over `grid` on the current stream (or only note it, inside :func:`recording`)."""
    if _recorder is not None:
        _recorder(Launch(kernel, grid, args, meta))
        return
    kernel[grid](*args, **meta)


@contextlib.contextmanager
def recording():
    """Within it no kernel runs: yields the list that launches are noted in. Tensors may then be on the meta device."""
    calls: list[Launch] = []
    with _noting(calls.append):
        yield calls


@contextlib.contextmanager
def compiling_ahead():
    """Within it no kernel runs; at its end those of the launches are compiled for the current CUDA device, several at a time. A
    kernel that does not compile says so when it is launched. Only the first launch of each kind is kept until then: layers launch the
    same kernels over and over, and what all of them write would be gigabytes."""
    import triton

    kinds: dict[object, Launch] = {}
    with _noting(lambda call: kinds.setdefault(_kind(call), call)):
        yield
    with (
        concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool,
        triton.AsyncCompileMode(pool, ignore_errors=True),
    ):
        for call in kinds.values():
            with contextlib.suppress(Exception):  # the front end compiles in this thread, and may refuse as well
                call.kernel.run(*call.args, grid=call.grid, warmup=True, **call.meta)


@contextlib.contextmanager
def _noting(note: Callable[[Launch], object]):
    global _recorder
    _recorder = note
    try:
        yield
    finally:
        _recorder = None


def _kind(call: Launch) -> object:
    """What a launch has in common with those that run the same code."""

    def kind(argument: object) -> object:
        if isinstance(argument, torch.Tensor):
            return argument.dtype, argument.data_ptr() % 16 == 0
        if hasattr(argument, "block_shape"):  # a tensor descriptor
            return argument.base.dtype, *argument.block_shape
        return argument

    return id(call.kernel), tuple(map(kind, call.args)), tuple(call.meta.items())


@functools.cache
def num_sms(device: torch.device) -> int:
    """Multiprocessors of `device`; an H200's for meta tensors, a handful where the interpreter runs."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 132 if device.type == "meta" else INTERPRETED_SMS


@functools.cache
def copies_by_descriptor(device: torch.device) -> bool:
    """Whether kernels on `device` can read through tensor descriptors, as from Hopper on; off CUDA the interpreter does."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] >= 9


@functools.cache
def multiplies_by_warp_groups(device: torch.device) -> bool:
    """Whether a product on `device` takes groups of four warps, as Hopper's do; as for an H200 off CUDA."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] == 9


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()
