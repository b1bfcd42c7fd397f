"""The resident FFN executor's kernels: the worker that never returns, and the two that talk to it.

The worker polls a ring of descriptors (sequence, model, layer, rows, slot). A task has three phases, each a share of
programs' work ended by an arrival at one counter that only grows: router logits (the last program to arrive chooses the
experts for all, then opens the gate), gate-up-SiLU into scratch, and down into the slot (the last to arrive publishes it).
Programs take work in a fixed stride and wait for earlier phases only, so a grid of one program is a valid grid: that is
how the interpreter runs it. Sizes and weights come from the layer table at run time; nothing is compiled for a model,
and no argument of the kernels that run beside the worker is specialised (see :mod:`kernels.mailbox.triton`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.mailbox.triton import copy_share, last_to_arrive, spin_until
from kernels.moe_ffn.triton import gate_up_tile
from kernels.resident_ffn.layers import COLUMNS, SIZE_MULTIPLE
from kernels.router.triton import NEVER, choose_experts
from kernels.tile import dot

FIELDS = tl.constexpr(8)  # int32 words of a descriptor: sequence, model, layer, rows, slot, and three unused
STOP = tl.constexpr(-1)  # the model of a descriptor that ends the worker
NUM_COLUMNS = tl.constexpr(len(COLUMNS))
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

ERROR_QUEUE = tl.constexpr(2)  # no descriptor came
ERROR_GATE = tl.constexpr(3)  # another program did not arrive
ERROR_RING = tl.constexpr(4)  # the ring stayed full
ERROR_RESULT = tl.constexpr(5)  # a result did not come


@triton.jit
def _size(entry, column: tl.constexpr):
    """A size of a layer, known to be a multiple of what wide reads need."""
    return tl.multiple_of(tl.load(entry + column).to(tl.int32), MULTIPLE)


@triton.jit
def _weights(entry, column: tl.constexpr, DTYPE: tl.constexpr):
    return tl.multiple_of(tl.load(entry + column).to(tl.pointer_type(DTYPE)), MULTIPLE)


@triton.jit
def _arrive(counter_ptr, SCOPE: tl.constexpr):
    """Count this program in once all its stores are done; how many were counted before. `SCOPE` is who may read them."""
    tl.debug_barrier()
    return tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope=SCOPE)


@triton.jit
def _open_gate(gate_ptr, phase):
    tl.debug_barrier()
    tl.atomic_xchg(gate_ptr, phase, sem="release", scope="gpu")


@triton.jit
def _router_logits(
    entry, x, logits_ptr, depth, num_experts, mask, DTYPE: tl.constexpr, ROWS: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """This program's experts' logits for the tile's rows."""
    lane = tl.arange(0, BLOCK_R)[None, :]
    row = tl.arange(0, ROWS)
    router = _weights(entry, COLUMN_ROUTER, DTYPE)
    for expert in range(tl.program_id(0), num_experts, tl.num_programs(0)):
        acc = tl.zeros((ROWS,), tl.float32)
        for start in range(0, depth, BLOCK_R):
            channel = start + lane
            rows = tl.load(x + channel, mask=mask[:, None] & (channel < depth), other=0.0, cache_modifier=".cg")
            weight = tl.load(router + tl.cast(expert, tl.int64) * depth + channel, mask=channel < depth, other=0.0)
            acc += tl.sum(rows.to(tl.float32) * weight.to(tl.float32), axis=1)
        tl.store(logits_ptr + row * BLOCK_E + expert, acc)


@triton.jit
def _choose(
    entry, scale_ptr, logits_ptr, routing_ptr, active_ptr, mask, num_experts, top_k, ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr, TOP_K: tl.constexpr, GROUPS: tl.constexpr,
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
    weights, experts = choose_experts(
        logits,
        correction,
        tl.load(entry + COLUMN_RULE).to(tl.int32),
        top_k,
        tl.load(scale_ptr),
        num_experts,
        tl.load(entry + COLUMN_NUM_GROUPS).to(tl.int32),
        tl.load(entry + COLUMN_TOP_GROUPS).to(tl.int32),
        GROUPS,
        TOP_K,
    )
    slot = tl.arange(0, TOP_K)[None, :]
    spread = tl.zeros((ROWS, BLOCK_E), tl.float32)
    chosen = tl.zeros((ROWS, BLOCK_E), tl.int32)
    for rank in range(top_k):
        its_expert = tl.sum(tl.where(slot == rank, experts, 0), axis=1)[:, None]
        its_weight = tl.sum(tl.where(slot == rank, weights, 0.0), axis=1)[:, None]
        mine = (expert == its_expert) & mask[:, None]
        spread = tl.where(mine, its_weight, spread)
        chosen = tl.where(mine, 1, chosen)
    tl.store(routing_ptr + row * BLOCK_E + expert, spread)
    present = tl.max(chosen, axis=0)  # [E]
    place = tl.cumsum(present, axis=0)
    tl.store(active_ptr + place, tl.arange(0, BLOCK_E), mask=present == 1)  # place 0 holds the count
    tl.store(active_ptr, tl.sum(present))


@triton.jit
def _gate_up_phase(
    entry, x, routing_ptr, active_ptr, hidden_ptr, shared_hidden_ptr, depth, mask, DTYPE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """This program's share of silu(gate x) * (up x) times the routing weight, of the active experts, then the shared."""
    row = tl.arange(0, ROWS)
    expert_width = _size(entry, COLUMN_WIDTH)
    shared_width = _size(entry, COLUMN_SHARED_WIDTH)
    slices = tl.cdiv(expert_width, BLOCK_N)
    routed = tl.load(active_ptr, cache_modifier=".cg") * slices
    routed_weights = _weights(entry, COLUMN_GATE_UP, DTYPE)
    shared_weights = _weights(entry, COLUMN_SHARED_GATE_UP, DTYPE)
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
        result = gate_up_tile(x, weights, first, width, depth, chose[:, None], False, ROWS, BLOCK_N, BLOCK_K)
        out = first + tl.arange(0, BLOCK_N)[None, :]
        # Rows that did not choose the expert are stored too, as zeros: down then needs no mask but the rows'.
        result = (result * weight[:, None]).to(DTYPE)
        tl.store(hidden + row[:, None] * width + out, result, mask=mask[:, None] & (out < width))


@triton.jit
def _down_phase(
    entry, out_rows, active_ptr, hidden_ptr, shared_hidden_ptr, depth, mask, DTYPE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """This program's output channels: the sum over active experts, then the shared FFN, in one accumulator."""
    row = tl.arange(0, ROWS)[:, None]
    lane = tl.arange(0, BLOCK_K)[None, :]
    width = _size(entry, COLUMN_WIDTH)
    shared_width = _size(entry, COLUMN_SHARED_WIDTH)
    routed_weights = _weights(entry, COLUMN_DOWN, DTYPE)
    shared_weights = _weights(entry, COLUMN_SHARED_DOWN, DTYPE)
    steps = tl.cdiv(width, BLOCK_K)
    routed_steps = tl.load(active_ptr, cache_modifier=".cg") * steps
    for job in range(tl.program_id(0), tl.cdiv(depth, BLOCK_N), tl.num_programs(0)):
        out = job * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = (out < depth)[:, None]
        acc = tl.zeros((ROWS, BLOCK_N), tl.float32)
        # One loop over experts and their width, so that reads stay in flight from one expert to the next.
        for step in tl.range(routed_steps, num_stages=9):
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


@triton.jit(do_not_specialize=["task", "max_tasks", "max_spins"])
def resident_worker_kernel(
    queue_ptr,
    table_ptr,
    scales_ptr,
    first_layer_ptr,
    in_ptr,
    out_ptr,
    done_ptr,
    finished_ptr,
    logits_ptr,
    routing_ptr,
    active_ptr,
    hidden_ptr,
    shared_hidden_ptr,
    counter_ptr,
    gate_ptr,
    error_ptr,
    task,
    max_tasks,
    slot_elements,
    max_spins,
    CAPACITY: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    TOP_K: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DOWN_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Run tasks `task`.. until a descriptor says stop, `max_tasks` are done, or a wait has lasted `max_spins` looks."""
    DTYPE: tl.constexpr = in_ptr.dtype.element_ty
    programs = tl.num_programs(0)
    phase = tl.zeros((), tl.int64)  # gates passed since the launch; counter and gate start at 0
    left = tl.zeros((), tl.int32) + max_tasks
    task = tl.zeros((), tl.int32) + task
    while left > 0:
        descriptor = queue_ptr + (task % CAPACITY) * FIELDS
        came = spin_until(descriptor, task + 1, max_spins)
        model = tl.load(descriptor + 1, cache_modifier=".cg")
        left -= 1
        if not came:
            tl.store(error_ptr, ERROR_QUEUE)
            left = left * 0
        elif model == STOP:
            left = left * 0
        else:
            layer = tl.load(first_layer_ptr + model) + tl.load(descriptor + 2, cache_modifier=".cg")
            rows = tl.load(descriptor + 3, cache_modifier=".cg")
            slot = tl.load(descriptor + 4, cache_modifier=".cg")
            entry = table_ptr + layer.to(tl.int64) * NUM_COLUMNS
            depth = _size(entry, COLUMN_DEPTH)
            num_experts = tl.load(entry + COLUMN_NUM_EXPERTS).to(tl.int32)
            top_k = tl.load(entry + COLUMN_TOP_K).to(tl.int32)
            base = tl.multiple_of(slot.to(tl.int64) * slot_elements, MULTIPLE)
            for chunk in range(0, rows, ROWS):
                row = chunk + tl.arange(0, ROWS)
                mask = row < rows
                x = in_ptr + base + row[:, None] * depth
                _router_logits(entry, x, logits_ptr, depth, num_experts, mask, DTYPE, ROWS, BLOCK_E, BLOCK_R)
                arrived = _arrive(counter_ptr, "gpu")
                phase += 1
                if arrived == phase * programs - 1:
                    _choose(
                        entry, scales_ptr + layer, logits_ptr, routing_ptr, active_ptr, mask, num_experts, top_k,
                        ROWS, BLOCK_E, TOP_K, GROUPS,
                    )  # fmt: skip
                    _open_gate(gate_ptr, phase)
                opened = spin_until(gate_ptr, phase, max_spins)
                _gate_up_phase(
                    entry, x, routing_ptr, active_ptr, hidden_ptr, shared_hidden_ptr, depth, mask, DTYPE,
                    ROWS, BLOCK_E, BLOCK_N, BLOCK_K,
                )  # fmt: skip
                arrived = _arrive(counter_ptr, "gpu")
                phase += 1
                if arrived == phase * programs - 1:
                    _open_gate(gate_ptr, phase)
                opened = spin_until(gate_ptr, phase, max_spins) & opened
                out_rows = out_ptr + base + row[:, None] * depth
                _down_phase(
                    entry, out_rows, active_ptr, hidden_ptr, shared_hidden_ptr, depth, mask, DTYPE,
                    ROWS, DOWN_N, BLOCK_K,
                )  # fmt: skip
                arrived = _arrive(counter_ptr, "sys")
                phase += 1
                if (arrived == phase * programs - 1) & (chunk + ROWS >= rows):
                    tl.debug_barrier()
                    tl.atomic_xchg(done_ptr + slot, task + 1, sem="release", scope="sys")
                    tl.atomic_xchg(finished_ptr, task + 1, sem="release", scope="sys")
                if not opened:
                    tl.store(error_ptr, ERROR_GATE)
                    left = left * 0
            task += 1


@triton.jit(
    do_not_specialize=["model", "layer", "slot", "rows", "width", "stride", "slot_elements", "max_spins"],
    do_not_specialize_on_alignment=["x_ptr"],
)
def submit_kernel(
    x_ptr,
    in_ptr,
    queue_ptr,
    tickets_ptr,
    arrivals_ptr,
    expected_ptr,
    finished_ptr,
    error_ptr,
    model,
    layer,
    slot,
    rows,
    width,
    stride,
    slot_elements,
    max_spins,
    CAPACITY: tl.constexpr,
    PROGRAMS: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copy the rows into the slot; the last program takes the next ticket and writes its descriptor."""
    copy_share(x_ptr, in_ptr + tl.cast(slot, tl.int64) * slot_elements, rows, width, stride, PACKED, BLOCK)
    if last_to_arrive(arrivals_ptr + slot, PROGRAMS):
        ticket = tl.atomic_add(tickets_ptr, 1, sem="acq_rel", scope="sys")
        # The ring's entry is free once the task that it last held is finished.
        if not spin_until(finished_ptr, ticket + 1 - CAPACITY, max_spins):
            tl.store(error_ptr, ERROR_RING)
        descriptor = queue_ptr + (ticket % CAPACITY) * FIELDS
        tl.store(descriptor + 1, model)
        tl.store(descriptor + 2, layer)
        tl.store(descriptor + 3, rows)
        tl.store(descriptor + 4, slot)
        tl.store(expected_ptr + slot, ticket + 1)
        tl.debug_barrier()
        tl.atomic_xchg(descriptor, ticket + 1, sem="release", scope="sys")


@triton.jit(
    do_not_specialize=["slot", "rows", "width", "slot_elements", "max_spins"], do_not_specialize_on_alignment=["y_ptr"]
)
def collect_kernel(
    out_ptr,
    y_ptr,
    done_ptr,
    expected_ptr,
    error_ptr,
    slot,
    rows,
    width,
    slot_elements,
    max_spins,
    BLOCK: tl.constexpr,
):
    """Wait until the slot's last task is published, then copy its rows out."""
    if not spin_until(done_ptr + slot, tl.load(expected_ptr + slot), max_spins):
        tl.store(error_ptr, ERROR_RESULT)
    copy_share(out_ptr + tl.cast(slot, tl.int64) * slot_elements, y_ptr, rows, width, width, True, BLOCK)
