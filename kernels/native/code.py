"""What :mod:`kernels.native` compiles: the tile as LLVM code by way of Numba, and the loops around it.

All of it lies in one file because Numba's cache of compiled functions looks at one file's time stamp.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from llvmlite import binding as llvm
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from kernels.native.layout import BLOCK, address, packed_as_read

MOST_ROWS = 6  # of one tile: 6 x 4 sums, 4 weights and a factor fit the 32 vector registers

_I32, _I64, _F32 = ir.IntType(32), ir.IntType(64), ir.FloatType()
_INTS, _FLOATS = ir.VectorType(_I32, 16), ir.VectorType(_F32, 16)
_LINE = 64  # bytes of a vector
_CONTRACT = ("contract",)
llvm.initialize_native_asmparser()  # for the one instruction that is written out


def _compiled(function):
    """Compiled on first use without the interpreter lock, and kept on disk where a place for that can be written to."""
    options = {"nogil": True, "fastmath": {"contract"}}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # no such place
        return numba.njit(**options)(function)


def _tile(rows: int, narrow: bool):
    """The innermost loop: `rows` rows of x, each `count` columns from `x` on, `x_stride` bytes apart, times one block of
    weights at `w`, into float32 at `y`, `y_stride` bytes apart; all addresses. `narrow`: x and w are bfloat16, of which
    one instruction multiplies and adds two columns."""
    columns, x_bytes, step_bytes = (2, 2, BLOCK * 4) if narrow else (1, 4, BLOCK * 4)
    loaded, scalar = (_INTS, _I32) if narrow else (_FLOATS, _F32)

    @intrinsic
    def multiply(typing, w, x, x_stride, count, y, y_stride):
        def generate(context, builder, signature, arguments):
            weights, x, x_stride, count, y, y_stride = arguments
            entry = builder.block
            test, step, end = (builder.append_basic_block(name) for name in ("test", "step", "end"))

            def at(base: ir.Value, offset: int, kind: ir.Type) -> ir.Value:
                return builder.inttoptr(builder.add(base, ir.Constant(_I64, offset)), kind.as_pointer())

            def times(value: ir.Value, factor: int) -> ir.Value:
                return builder.mul(value, ir.Constant(_I64, factor))

            def splat(value: ir.Value) -> ir.Value:
                nothing = ir.Constant(loaded, ir.Undefined)
                first = builder.insert_element(nothing, value, ir.Constant(_I32, 0))
                return builder.shuffle_vector(first, nothing, ir.Constant(_INTS, [0] * 16))

            def add_product(total: ir.Value, factor: ir.Value, vector: ir.Value) -> ir.Value:
                if not narrow:
                    product = builder.fmul(factor, vector, flags=_CONTRACT)
                    return builder.fadd(product, total, flags=_CONTRACT)
                kind = ir.FunctionType(_FLOATS, [_FLOATS, _INTS, _INTS])
                return builder.asm(kind, "vdpbf16ps $3, $2, $0", "=v,0,v,v", [total, factor, vector], side_effect=False)

            bases = [builder.add(x, times(x_stride, row)) for row in range(rows)]
            builder.branch(test)

            builder.position_at_end(test)
            index = builder.phi(_I64)
            index.add_incoming(ir.Constant(_I64, 0), entry)
            sums = [[builder.phi(_FLOATS) for _ in range(4)] for _ in range(rows)]
            for phi in (phi for row in sums for phi in row):
                phi.add_incoming(ir.Constant(_FLOATS, [0.0] * 16), entry)
            builder.cbranch(builder.icmp_signed("<", index, count), step, end)

            builder.position_at_end(step)
            line = builder.add(weights, times(index, step_bytes // columns))
            vectors = [builder.load(at(line, part * _LINE, loaded), align=4) for part in range(4)]
            offset = times(index, x_bytes)
            for row, base in enumerate(bases):
                factor = splat(builder.load(at(builder.add(base, offset), 0, scalar), align=2))
                for part, vector in enumerate(vectors):
                    sums[row][part].add_incoming(add_product(sums[row][part], factor, vector), builder.block)
            index.add_incoming(builder.add(index, ir.Constant(_I64, columns)), builder.block)
            builder.branch(test)

            builder.position_at_end(end)
            for row in range(rows):
                target = builder.add(y, times(y_stride, row))
                for part in range(4):
                    builder.store(sums[row][part], at(target, part * _LINE, _FLOATS), align=4)
            return context.get_dummy_value()

        return types.void(*(types.int64,) * 6), generate

    return multiply


_WIDE_1, _WIDE_2, _WIDE_3, _WIDE_4, _WIDE_5, _WIDE_6 = (_tile(rows, False) for rows in range(1, MOST_ROWS + 1))
_NARROW_1, _NARROW_2, _NARROW_3, _NARROW_4, _NARROW_5, _NARROW_6 = (
    _tile(rows, True) for rows in range(1, MOST_ROWS + 1)
)


@numba.njit(nogil=True)
def _multiply(w, narrow, x, x_stride, rows, count, y, y_stride):
    """One tile of `rows` rows, at most MOST_ROWS."""
    if narrow:
        if rows == 1:
            _NARROW_1(w, x, x_stride, count, y, y_stride)
        elif rows == 2:
            _NARROW_2(w, x, x_stride, count, y, y_stride)
        elif rows == 3:
            _NARROW_3(w, x, x_stride, count, y, y_stride)
        elif rows == 4:
            _NARROW_4(w, x, x_stride, count, y, y_stride)
        elif rows == 5:
            _NARROW_5(w, x, x_stride, count, y, y_stride)
        else:
            _NARROW_6(w, x, x_stride, count, y, y_stride)
    elif rows == 1:
        _WIDE_1(w, x, x_stride, count, y, y_stride)
    elif rows == 2:
        _WIDE_2(w, x, x_stride, count, y, y_stride)
    elif rows == 3:
        _WIDE_3(w, x, x_stride, count, y, y_stride)
    elif rows == 4:
        _WIDE_4(w, x, x_stride, count, y, y_stride)
    elif rows == 5:
        _WIDE_5(w, x, x_stride, count, y, y_stride)
    else:
        _WIDE_6(w, x, x_stride, count, y, y_stride)


@numba.njit(nogil=True)
def _product(w, narrow, x, x_stride, rows, count, y, y_stride, outputs):
    """All blocks of `outputs` outputs; a block's weights are read from memory for the first rows, from cache for more."""
    padded = (count + 31) // 32 * 32 * 2 if narrow else (count + 15) // 16 * 16 * 4  # bytes of a column of a block
    for block in range((outputs + BLOCK - 1) // BLOCK):
        for first in range(0, rows, MOST_ROWS):
            _multiply(
                w + block * padded * BLOCK, narrow, x + first * x_stride, x_stride, min(MOST_ROWS, rows - first), count,
                y + first * y_stride + block * BLOCK * 4, y_stride,
            )  # fmt: skip


@numba.njit(nogil=True, fastmath={"contract"}, error_model="numpy")
def _exp(x):
    """e^x in float32 to 2 units in the last place (Cephes' polynomial): plain arithmetic, which LLVM makes vectors of."""
    x = min(max(x, np.float32(-87.0)), np.float32(88.0))
    power = np.floor(x * np.float32(1.44269504088896341) + np.float32(0.5))
    rest = x - power * np.float32(0.693359375) - power * np.float32(-2.12194440e-4)
    series = np.float32(1.9875691500e-4)
    series = series * rest + np.float32(1.3981999507e-3)
    series = series * rest + np.float32(8.3334519073e-3)
    series = series * rest + np.float32(4.1665795894e-2)
    series = series * rest + np.float32(1.6666665459e-1)
    series = series * rest + np.float32(5.0000001201e-1)
    series = series * rest * rest + rest + np.float32(1.0)
    return series * np.int32((np.int32(power) + 127) << 23).view(np.float32)


@numba.njit(nogil=True, fastmath={"contract"}, error_model="numpy")
def _activate(hidden, rows, width, out, narrow):
    """silu(gate) * up of `hidden` [rows, >= 2 width] into `out` [rows, >= width], rounded to bfloat16 where `narrow`."""
    for row in range(rows):
        for column in range(width):
            gate = hidden[row, column]
            value = gate / (np.float32(1.0) + _exp(-gate)) * hidden[row, width + column]
            if narrow:
                bits = np.float32(value).view(np.uint32)
                out[row, column] = np.uint16(
                    (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> 16
                )
            else:
                out[row, column] = value


@_compiled
def _linear(x, w, narrow, outputs, out):
    rows, count = x.shape
    _product(w, narrow, x.ctypes.data, x.strides[0], rows, count, out.ctypes.data, out.strides[0], outputs)


@numba.njit(nogil=True)
def _swiglu(x, rows, gate_up, down, narrow, width, hidden, activated, out):
    """One FFN of the first `rows` rows of `x` into `out`; weights by address, the other two are scratch."""
    depth = x.shape[1]
    _product(
        gate_up, narrow, x.ctypes.data, x.strides[0], rows, depth, hidden.ctypes.data, hidden.strides[0], 2 * width
    )
    _activate(hidden, rows, width, activated, narrow)
    _product(
        down, narrow, activated.ctypes.data, activated.strides[0], rows, width, out.ctypes.data, out.strides[0], depth
    )


@_compiled
def _dense(x, gate_up, down, narrow, width, hidden, activated, out):
    _swiglu(x, x.shape[0], gate_up, down, narrow, width, hidden, activated, out)


@_compiled
def _routed(x, gate_up, down, narrow, width, topk_weights, topk_experts, hidden, activated, results, out):
    """All experts' FFNs, rows in order of expert, then the weighted sum over each row's choices."""
    rows, depth = x.shape
    top_k = topk_experts.shape[1]
    ends = np.zeros(len(gate_up) + 1, np.int64)  # of each expert's rows in the order by expert, once all are placed
    for row in range(rows):
        for slot in range(top_k):
            ends[topk_experts[row, slot] + 1] += 1
    for expert in range(len(gate_up)):
        ends[expert + 1] += ends[expert]
    place = np.empty((rows, top_k), np.int64)
    gathered = np.empty((rows * top_k, depth), x.dtype)
    for row in range(rows):
        for slot in range(top_k):
            expert = topk_experts[row, slot]
            place[row, slot] = ends[expert]
            gathered[ends[expert]] = x[row]
            ends[expert] += 1
    first = 0
    for expert in range(len(gate_up)):
        count = ends[expert] - first
        if count:
            _swiglu(
                gathered[first:],
                count,
                gate_up[expert],
                down[expert],
                narrow,
                width,
                hidden,
                activated,
                results[first:],
            )
        first = ends[expert]
    for row in range(rows):
        for column in range(depth):
            total = np.float32(0.0)
            for slot in range(top_k):
                total += topk_weights[row, slot] * results[place[row, slot], column]
            out[row, column] = total


def works(dtype: torch.dtype) -> bool:
    """Whether this machine has the instructions and oneDNN packs weights of `dtype` on it as the tiles here read them.
    Everything is compiled and tried on a small FFN here, so that no first request waits for a compiler."""
    wanted = {torch.float32: "avx512f", torch.bfloat16: "avx512bf16"}.get(dtype)
    if wanted is None or not llvm.get_host_cpu_features().get(wanted) or not packed_as_read(dtype):
        return False
    generator = torch.Generator().manual_seed(0)
    gate_up, down = (torch.randn(*shape, generator=generator).to(dtype) / 8 for shape in ((2 * 70, 66), (66, 70)))
    x = torch.randn(MOST_ROWS + 1, 66, generator=generator).to(dtype)
    gate, up = (x.float() @ gate_up.float().t()).chunk(2, dim=1)
    expected = (torch.nn.functional.silu(gate) * up) @ down.float().t()
    packed = [torch.ops.mkldnn._reorder_linear_weight(weight) for weight in (gate_up, down)]
    addresses = [np.array([address(weight)]) for weight in packed]
    alone = torch.ones(len(x), 1), torch.zeros(len(x), 1, dtype=torch.int64)
    results = dense_ffn(x, *packed), routed_ffn(x, *addresses, 70, *alone)
    products = linear(x, packed[0]), torch.cat([gate, up], dim=1)
    pairs = [products, *((result, expected) for result in results)]
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    return all((actual.float() - right).norm() <= bound * right.norm() for actual, right in pairs)


def _rows(x: torch.Tensor) -> np.ndarray:
    """`x` as Numba takes it: bfloat16 as its bits."""
    return (x if x.dtype == torch.float32 else x.view(torch.uint16)).numpy()


def _room(rows: int, columns: int) -> torch.Tensor:
    """Float32 scratch for `columns` outputs, whole blocks wide."""
    return torch.empty(rows, -(-columns // BLOCK) * BLOCK)


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`x` [T, K] times the transpose of packed `weight` [N, K]: [T, N] in x's dtype, summed in float32."""
    rows, outputs = x.shape[0], weight.shape[0]
    out = _room(rows, outputs)
    _linear(_rows(x.contiguous()), address(weight), x.dtype == torch.bfloat16, outputs, out.numpy())
    out = out if out.shape[1] == outputs else out[:, :outputs].contiguous()
    return out.to(x.dtype)


def dense_ffn(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """:func:`kernels.dense_ffn.dense_ffn` of packed weights."""
    rows, depth = x.shape
    width = down.shape[1]
    hidden, activated, out = _room(rows, 2 * width), torch.empty(rows, width, dtype=x.dtype), _room(rows, depth)
    _dense(
        _rows(x.contiguous()), address(gate_up), address(down), x.dtype == torch.bfloat16, width, hidden.numpy(),
        _rows(activated), out.numpy(),
    )  # fmt: skip
    out = out if out.shape[1] == depth else out[:, :depth].contiguous()
    return out.to(x.dtype)


def routed_ffn(
    x: torch.Tensor, gate_up: np.ndarray, down: np.ndarray, width: int, topk_weights: torch.Tensor,
    topk_experts: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """:func:`kernels.moe_ffn.moe_ffn` of packed experts of `width`, given by their addresses [E] int64."""
    rows, depth = x.shape
    choices = topk_experts.numel()
    hidden, results = _room(choices, 2 * width), _room(choices, depth)
    activated, out = torch.empty(choices, width, dtype=x.dtype), torch.empty(rows, depth)
    _routed(
        _rows(x.contiguous()), gate_up, down, x.dtype == torch.bfloat16, width, topk_weights.float().numpy(),
        topk_experts.numpy(), hidden.numpy(), _rows(activated), results.numpy(), out.numpy(),
    )  # fmt: skip
    return out.to(x.dtype)
