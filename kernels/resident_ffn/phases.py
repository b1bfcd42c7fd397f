"""The resident worker's phases: what each program does of a task, sizes and weights resolved from the layer table."""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.moe_ffn.tiles import gate_up_tile
from kernels.resident_ffn.layers import COLUMNS, SIZE_MULTIPLE
from kernels.router.triton import NEVER, spread_experts
from kernels.tile import dot

MULTIPLE = tl.constexpr(SIZE_MULTIPLE)

COLUMN_ROUTER = tl.constexpr(COLUMNS.index("router"))
COLUMN_BIAS = tl.constexpr(COLUMNS.index("bias"))
COLUMN_GATE_UP = tl.constexpr(COLUMNS.index("gate_up"))
COLUMN_DOWN = tl.constexpr(COLUMNS.index("down"))
COLUMN_SHARED_GATE_UP = tl.constexpr(COLUMNS.index("shared_gate_up"))
COLUMN_SHARED_DOWN = tl.constexpr(COLUMNS.index("shared_down"))
COLUMN_DEPTH = tl.constexpr(COLUMNS.index("depth"))
COLUMN_WIDTH = tl.constexpr(COLUMNS.index("width"))
COLUMN_SHARED_WIDTH = tl.constexpr(COLUMNS.index("shared_width"))
COLUMN_NUM_EXPERTS = tl.constexpr(COLUMNS.index("num_experts"))
COLUMN_TOP_K = tl.constexpr(COLUMNS.index("top_k"))
COLUMN_RULE = tl.constexpr(COLUMNS.index("rule"))
COLUMN_NUM_GROUPS = tl.constexpr(COLUMNS.index("num_groups"))
COLUMN_TOP_GROUPS = tl.constexpr(COLUMNS.index("top_groups"))


@triton.jit
def load_size(entry, column: tl.constexpr):
    """A size of a layer, known to be a multiple of what wide reads need."""
    return tl.multiple_of(tl.load(entry + column).to(tl.int32), MULTIPLE)


@triton.jit
def load_weights(entry, column: tl.constexpr, DTYPE: tl.constexpr):
    return tl.multiple_of(tl.load(entry + column).to(tl.pointer_type(DTYPE)), MULTIPLE)


@triton.jit
def arrive(counter_ptr):
    """Count this program in once all its stores are done; how many were counted before. Whoever sees them all counted may
    release the stores of all to another card too."""
    tl.debug_barrier()
    return tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")


@triton.jit
def open_gate(gate_ptr, phase):
    tl.debug_barrier()
    tl.atomic_xchg(gate_ptr, phase, sem="release", scope="gpu")


@triton.jit
def router_logits(
    entry, x, logits_ptr, depth, num_experts, mask, DTYPE: tl.constexpr, ROWS: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """This program's experts' logits for the tile's rows."""
    lane = tl.arange(0, BLOCK_R)[None, :]
    row = tl.arange(0, ROWS)
    router = load_weights(entry, COLUMN_ROUTER, DTYPE)
    for expert in range(tl.program_id(0), num_experts, tl.num_programs(0)):
        acc = tl.zeros((ROWS,), tl.float32)
        for start in range(0, depth, BLOCK_R):
            channel = start + lane
            rows = tl.load(x + channel, mask=mask[:, None] & (channel < depth), other=0.0, cache_modifier=".cg")
            weight = tl.load(router + tl.cast(expert, tl.int64) * depth + channel, mask=channel < depth, other=0.0)
            acc += tl.sum(rows.to(tl.float32) * weight.to(tl.float32), axis=1)
        tl.store(logits_ptr + row * BLOCK_E + expert, acc)


@triton.jit
def choose(
    entry, scale_ptr, logits_ptr, routing_ptr, active_ptr, mask, num_experts, top_k, ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Weights of all (row, expert) pairs into `routing`, 0 where not chosen; the chosen experts, counted and listed."""
    row = tl.arange(0, ROWS)[:, None]
    expert = tl.arange(0, BLOCK_E)[None, :]
    known = expert < num_experts
    logits = tl.load(logits_ptr + row * BLOCK_E + expert, mask=known & mask[:, None], other=0.0, cache_modifier=".cg")
    logits = tl.where(known, logits, NEVER)
    bias_address = tl.load(entry + COLUMN_BIAS)
    bias = bias_address.to(tl.pointer_type(tl.float32))
    num_corrected = tl.where(bias_address == 0, 0, num_experts)
    correction = tl.load(bias + expert, mask=expert < num_corrected, other=0.0)
    spread, chosen = spread_experts(
        logits,
        correction,
        tl.load(entry + COLUMN_RULE).to(tl.int32),
        top_k,
        tl.load(scale_ptr),
        num_experts,
        tl.load(entry + COLUMN_NUM_GROUPS).to(tl.int32),
        tl.load(entry + COLUMN_TOP_GROUPS).to(tl.int32),
        GROUPS,
    )
    spread = tl.where(mask[:, None], spread, 0.0)
    chosen = tl.where(mask[:, None], chosen, 0)
    tl.store(routing_ptr + row * BLOCK_E + expert, spread)
    present = tl.max(chosen, axis=0)  # [E]
    place = tl.cumsum(present, axis=0)
    tl.store(active_ptr + place, tl.arange(0, BLOCK_E), mask=present == 1)  # place 0 holds the count
    tl.store(active_ptr, tl.sum(present))


@triton.jit
def gate_up_phase(
    entry, x, routing_ptr, active_ptr, hidden_ptr, shared_hidden_ptr, depth, mask, DTYPE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """This program's share of silu(gate x) * (up x) times the routing weight, of the active experts, then the shared."""
    row = tl.arange(0, ROWS)
    expert_width = load_size(entry, COLUMN_WIDTH)
    shared_width = load_size(entry, COLUMN_SHARED_WIDTH)
    slices = tl.cdiv(expert_width, BLOCK_N)
    routed = tl.load(active_ptr, cache_modifier=".cg") * slices
    routed_weights = load_weights(entry, COLUMN_GATE_UP, DTYPE)
    shared_weights = load_weights(entry, COLUMN_SHARED_GATE_UP, DTYPE)
    for job in range(tl.program_id(0), routed + tl.cdiv(shared_width, BLOCK_N), tl.num_programs(0)):
        weight = tl.full((ROWS,), 1.0, tl.float32)
        weights = shared_weights
        hidden = shared_hidden_ptr
        width = shared_width
        first = (job - routed) * BLOCK_N
        chose = mask
        if job < routed:
            place = job // slices
            expert = tl.load(active_ptr + 1 + place, cache_modifier=".cg")
            weight = tl.load(routing_ptr + row * BLOCK_E + expert, cache_modifier=".cg")
            chose = mask & (weight != 0.0)
            width = expert_width
            weights = routed_weights + tl.cast(expert, tl.int64) * 2 * width * depth
            hidden = hidden_ptr + tl.cast(place, tl.int64) * ROWS * width
            first = (job % slices) * BLOCK_N
        result = gate_up_tile(x, weights, 0, first, width, depth, chose[:, None], False, False, ROWS, BLOCK_N, BLOCK_K)
        out = first + tl.arange(0, BLOCK_N)[None, :]
        # Rows that did not choose the expert are stored too, as zeros: down then needs no mask but the rows'.
        result = (result * weight[:, None]).to(DTYPE)
        tl.store(hidden + row[:, None] * width + out, result, mask=mask[:, None] & (out < width))


@triton.jit
def down_phase(
    entry, out_rows, active_ptr, hidden_ptr, shared_hidden_ptr, depth, mask, DTYPE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """This program's output channels: the sum over active experts, then the shared FFN, in one accumulator."""
    row = tl.arange(0, ROWS)[:, None]
    lane = tl.arange(0, BLOCK_K)[None, :]
    width = load_size(entry, COLUMN_WIDTH)
    shared_width = load_size(entry, COLUMN_SHARED_WIDTH)
    routed_weights = load_weights(entry, COLUMN_DOWN, DTYPE)
    shared_weights = load_weights(entry, COLUMN_SHARED_DOWN, DTYPE)
    steps = tl.cdiv(width, BLOCK_K)
    routed_steps = tl.load(active_ptr, cache_modifier=".cg") * steps
    for job in range(tl.program_id(0), tl.cdiv(depth, BLOCK_N), tl.num_programs(0)):
        out = job * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = (out < depth)[:, None]
        acc = tl.zeros((ROWS, BLOCK_N), tl.float32)
        # One loop over experts and their width, so that reads stay in flight from one expert to the next.
        for step in tl.range(routed_steps, num_stages=STAGES):
            place = step // steps
            channel = (step % steps) * BLOCK_K + lane
            expert = tl.load(active_ptr + 1 + place, cache_modifier=".cg").to(tl.int64)
            left = hidden_ptr + (tl.cast(place, tl.int64) * ROWS + row) * width + channel
            right = routed_weights + (expert * depth + out[:, None]) * width + channel
            hidden = tl.load(left, mask=mask[:, None] & (channel < width), other=0.0, cache_modifier=".cg")
            weight = tl.load(right, mask=inside & (channel < width), other=0.0)
            acc = dot(hidden, tl.trans(weight), acc)
        for start in range(0, shared_width, BLOCK_K):
            channel = start + lane
            left = shared_hidden_ptr + row * shared_width + channel
            right = shared_weights + out.to(tl.int64)[:, None] * shared_width + channel
            hidden = tl.load(left, mask=mask[:, None] & (channel < shared_width), other=0.0, cache_modifier=".cg")
            weight = tl.load(right, mask=inside & (channel < shared_width), other=0.0)
            acc = dot(hidden, tl.trans(weight), acc)
        tl.store(out_rows + out[None, :], acc.to(DTYPE), mask=mask[:, None] & (out < depth)[None, :])
