"""What :mod:`serving.memory.streaming` compiles, as LLVM code by way of Numba; apart, so that only who copies imports Numba."""

from __future__ import annotations

import numba
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

LINE_BYTES = 64
_LINES, _PAGE_BYTES, _STREAMS = 4, 4096, 2
_LINES_BYTES = _LINES * LINE_BYTES
STEP_BYTES = _STREAMS * _PAGE_BYTES

_ADDRESS, _LINE = ir.IntType(64), ir.VectorType(ir.IntType(64), LINE_BYTES // 8)
_OFFSETS = [stream * _PAGE_BYTES + number * LINE_BYTES for stream in range(_STREAMS) for number in range(_LINES)]


@intrinsic
def _move_lines(typing, target, source):
    """A few lines of each stream, by stores that the cache does not keep."""

    def generate(context, builder, signature, arguments):
        def at(base: ir.Value, offset: int) -> ir.Value:
            return builder.inttoptr(builder.add(base, ir.Constant(_ADDRESS, offset)), _LINE.as_pointer())

        unkept = builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)])
        target, source = arguments
        lines = [builder.load(at(source, offset), align=LINE_BYTES) for offset in _OFFSETS]
        for offset, line in zip(_OFFSETS, lines, strict=True):
            builder.store(line, at(target, offset), align=LINE_BYTES).set_metadata("nontemporal", unkept)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def _fence(typing):
    """Whoever sees what is written after this sees the lines too: nothing else orders such stores."""

    def generate(context, builder, signature, arguments):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


def _stream(target, source, length):
    for step in range(0, length, STEP_BYTES):
        for offset in range(0, _PAGE_BYTES, _LINES_BYTES):
            _move_lines(target + step + offset, source + step + offset)
    _fence()


def compiled():
    """`(target, source, length)`: copies whole steps of STEP_BYTES without the interpreter lock. Kept on disk where a place for
    that can be written to."""
    signature = types.void(types.int64, types.int64, types.int64)
    try:
        return numba.njit(signature, nogil=True, cache=True)(_stream)
    except RuntimeError:  # no such place
        return numba.njit(signature, nogil=True)(_stream)
