"""The resident FFN executor's kernels: the worker that never returns, and the two that talk to it.

The worker polls a ring of descriptors (sequence, model, layer, rows, slot). A task has three phases, each a share of
programs' work ended by an arrival at a counter that only grows: router logits (the last program to arrive chooses the
experts for all, then opens the gate), gate-up-SiLU into scratch (the last opens the gate again), and down into the slot (the
last to arrive publishes it). Nobody waits after the last phase: where the next task is there already, programs arrive in it
while others still work at this one. So that phase has a counter of its own, which nobody reaches again before all have left it.
Programs take work in a fixed stride and wait for earlier phases only, so a grid of one program is a valid grid: that is
how the interpreter runs it. Sizes and weights come from the layer table at run time; nothing is compiled for a model,
and no argument of the kernels that run beside the worker is specialised (see :mod:`kernels.mailbox.triton`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.mailbox.triton import copy_share, last_to_arrive, spin_until
from kernels.resident_ffn.layers import COLUMNS
from kernels.resident_ffn.phases import (
    COLUMN_DEPTH,
    COLUMN_NUM_EXPERTS,
    COLUMN_TOP_K,
    MULTIPLE,
    arrive,
    choose,
    down_phase,
    gate_up_phase,
    load_size,
    open_gate,
    router_logits,
)

FIELDS = tl.constexpr(8)  # int32 words of a descriptor: sequence, model, layer, rows, slot, and three unused
STOP = tl.constexpr(-1)  # the model of a descriptor that ends the worker
NUM_COLUMNS = tl.constexpr(len(COLUMNS))

ERROR_QUEUE = tl.constexpr(2)  # no descriptor came
ERROR_GATE = tl.constexpr(3)  # another program did not arrive
ERROR_RING = tl.constexpr(4)  # the ring stayed full
ERROR_RESULT = tl.constexpr(5)  # a result did not come


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
    gated_ptr,
    finished_programs_ptr,
    gate_ptr,
    error_ptr,
    task,
    max_tasks,
    slot_elements,
    max_spins,
    CAPACITY: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DOWN_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOWN_K: tl.constexpr,
    DOWN_STAGES: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Run tasks `task`.. until a descriptor says stop, `max_tasks` are done, or a wait has lasted `max_spins` looks."""
    DTYPE: tl.constexpr = in_ptr.dtype.element_ty
    programs = tl.num_programs(0)
    # Since the launch, at which all counters and the gate are 0: gates passed, and tiles of rows done.
    phase = tl.zeros((), tl.int64)
    tiles = tl.zeros((), tl.int64)
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
            depth = load_size(entry, COLUMN_DEPTH)
            num_experts = tl.load(entry + COLUMN_NUM_EXPERTS).to(tl.int32)
            top_k = tl.load(entry + COLUMN_TOP_K).to(tl.int32)
            base = tl.multiple_of(slot.to(tl.int64) * slot_elements, MULTIPLE)
            for chunk in range(0, rows, ROWS):
                row = chunk + tl.arange(0, ROWS)
                mask = row < rows
                x = in_ptr + base + row[:, None] * depth
                router_logits(entry, x, logits_ptr, depth, num_experts, mask, DTYPE, ROWS, BLOCK_E, BLOCK_R)
                arrived = arrive(gated_ptr)
                phase += 1
                if arrived == phase * programs - 1:
                    choose(
                        entry, scales_ptr + layer, logits_ptr, routing_ptr, active_ptr, mask, num_experts, top_k,
                        ROWS, BLOCK_E, GROUPS,
                    )  # fmt: skip
                    open_gate(gate_ptr, phase)
                opened = spin_until(gate_ptr, phase, max_spins)
                gate_up_phase(
                    entry, x, routing_ptr, active_ptr, hidden_ptr, shared_hidden_ptr, depth, mask, DTYPE,
                    ROWS, BLOCK_E, BLOCK_N, BLOCK_K,
                )  # fmt: skip
                arrived = arrive(gated_ptr)
                phase += 1
                if arrived == phase * programs - 1:
                    open_gate(gate_ptr, phase)
                opened = spin_until(gate_ptr, phase, max_spins) & opened
                out_rows = out_ptr + base + row[:, None] * depth
                down_phase(
                    entry, out_rows, active_ptr, hidden_ptr, shared_hidden_ptr, depth, mask, DTYPE,
                    ROWS, DOWN_N, DOWN_K, DOWN_STAGES,
                )  # fmt: skip
                arrived = arrive(finished_programs_ptr)
                tiles += 1
                if (arrived == tiles * programs - 1) & (chunk + ROWS >= rows):
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
