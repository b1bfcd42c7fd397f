"""Put and wait on CUDA: release after the rows, acquire before reading them, system scope, growing sequence numbers.

No argument is specialised: a new value must never compile or load a module, which could wait forever for a kernel that
spins on the same card.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.launch import ceil_div, launch
from kernels.mailbox.state import TIMED_OUT, Mailbox

MAX_PROGRAMS = 16
BLOCK = 2048


@triton.jit
def spin_until(flag_ptr, target, max_spins):
    """Poll until the flag reaches `target`; whether it did within `max_spins` looks. Acquires at system scope."""
    spins = 0
    seen = tl.atomic_add(flag_ptr, 0, sem="acquire", scope="sys")
    while (seen < target) & (spins < max_spins):
        seen = tl.atomic_add(flag_ptr, 0, sem="acquire", scope="sys")
        spins += 1
    tl.debug_barrier()
    return seen >= target


@triton.jit
def copy_share(source_ptr, target_ptr, rows, width, source_stride, PACKED: tl.constexpr, BLOCK: tl.constexpr):
    """This program's share of rows [rows, width] copied to a packed target."""
    lane = tl.arange(0, BLOCK)
    total = rows * width
    for start in range(tl.program_id(0) * BLOCK, total, tl.num_programs(0) * BLOCK):
        place = start + lane
        inside = place < total
        source = place
        if not PACKED:
            source = (place // width) * source_stride + place % width
        tl.store(target_ptr + place, tl.load(source_ptr + source, mask=inside, cache_modifier=".cg"), mask=inside)


@triton.jit
def last_to_arrive(arrivals_ptr, PROGRAMS: tl.constexpr):
    """Count this program in once all its stores are done; whether all `PROGRAMS` of the launch are now counted."""
    # Without the barrier other threads' stores may trail the arrival, or the flag that follows it. The others are on this
    # card: what their arrivals release, the last one's flag releases to the whole system (causality order of PTX).
    tl.debug_barrier()
    last = True
    if PROGRAMS > 1:
        arrived = tl.atomic_add(arrivals_ptr, 1, sem="acq_rel", scope="gpu")
        last = arrived % PROGRAMS == PROGRAMS - 1
    return last


def programs_to_copy(slot_elements: int) -> int:
    """Programs of a launch that fills a slot: constant for the slot, so that arrivals need never be reset."""
    return min(MAX_PROGRAMS, ceil_div(slot_elements, BLOCK))


@triton.jit(
    do_not_specialize=["slot", "slot_elements", "rows", "width", "stride"], do_not_specialize_on_alignment=["x_ptr"]
)
def _put_kernel(
    x_ptr,
    rows_ptr,
    published_ptr,
    sent_ptr,
    arrivals_ptr,
    slot,
    slot_elements,
    rows,
    width,
    stride,
    PROGRAMS: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sequence = tl.load(sent_ptr + slot) + 1
    copy_share(x_ptr, rows_ptr + tl.cast(slot, tl.int64) * slot_elements, rows, width, stride, PACKED, BLOCK)
    if last_to_arrive(arrivals_ptr + slot, PROGRAMS):
        tl.store(sent_ptr + slot, sequence)
        tl.atomic_xchg(published_ptr + slot, sequence, sem="release", scope="sys")


@triton.jit(do_not_specialize=["slot", "max_spins"])
def _wait_kernel(published_ptr, taken_ptr, error_ptr, slot, max_spins, CODE: tl.constexpr):
    target = tl.load(taken_ptr + slot) + 1
    if not spin_until(published_ptr + slot, target, max_spins):
        tl.store(error_ptr, CODE)
    tl.store(taken_ptr + slot, target)


def put(mailbox: Mailbox, slot: int, x: torch.Tensor) -> None:
    """See :func:`kernels.mailbox.put`."""
    rows, width = x.shape
    programs = programs_to_copy(mailbox.rows.stride(0))
    launch(
        _put_kernel,
        (programs,),
        x,
        mailbox.rows,
        mailbox.published,
        mailbox.sent,
        mailbox.arrivals,
        slot,
        mailbox.rows.stride(0),
        rows,
        width,
        x.stride(0),
        PROGRAMS=programs,
        PACKED=x.is_contiguous(),
        BLOCK=BLOCK,
        num_warps=4,
    )


def wait(mailbox: Mailbox, slot: int, num_rows: int, width: int, max_spins: int) -> torch.Tensor:
    """See :func:`kernels.mailbox.wait`."""
    launch(
        _wait_kernel,
        (1,),
        mailbox.published,
        mailbox.taken,
        mailbox.error,
        slot,
        max_spins,
        CODE=TIMED_OUT,
        num_warps=1,
    )
    return mailbox.filled(slot, num_rows, width)
