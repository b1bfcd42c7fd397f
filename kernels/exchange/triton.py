"""Post and collect on CUDA: each program writes its share of the rows into all targets, raises its own flag there (release,
system scope), and reads the same share of what others posted once their flags are up (acquire).

No program waits for another of its launch, so a launch needs no barrier over the card. No argument is specialised: a new value
must never compile or load a module, which could wait forever for a kernel that spins on the same card.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.exchange.state import BLOCK, TIMED_OUT, Inbox, Outbox, programs_for
from kernels.launch import launch
from kernels.mailbox.triton import spin_until


@triton.jit(
    do_not_specialize=["part_elements", "sent_turn_elements", "read_turn_elements", "slot_elements", "max_spins"],
    do_not_specialize_on_alignment=["x_ptr", "out_ptr"],
)
def _exchange_kernel(
    x_ptr,
    out_ptr,
    slots_at_ptr,
    flags_at_ptr,
    sent_ptr,
    slots_ptr,
    flags_ptr,
    taken_ptr,
    error_ptr,
    part_elements,  # that each target is sent, and each source posts
    sent_turn_elements,  # from one filling of a target's inbox to the other
    read_turn_elements,  # and of the own one
    slot_elements,
    max_spins,
    TARGETS: tl.constexpr,  # 0: nothing is posted
    SOURCES: tl.constexpr,  # 0: nothing is collected
    PER_PART: tl.constexpr,
    TOTAL: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK: tl.constexpr,
    CODE: tl.constexpr,
):
    program = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    kind = out_ptr.dtype.element_ty
    if TARGETS > 0:
        count = tl.load(sent_ptr + program) + 1
        turn_at = tl.cast(count % 2, tl.int64) * sent_turn_elements
        for target in tl.static_range(TARGETS):
            slot_ptr = tl.load(slots_at_ptr + target).to(tl.pointer_type(kind)) + turn_at
            source_ptr = x_ptr
            if PER_PART > 0:
                source_ptr = x_ptr + (target // PER_PART) * part_elements
            for start in range(program * BLOCK, part_elements, PROGRAMS * BLOCK):
                place = start + lane
                inside = place < part_elements
                tl.store(slot_ptr + place, tl.load(source_ptr + place, mask=inside), mask=inside)
        tl.debug_barrier()  # without it other threads' stores may trail the flags
        for target in tl.static_range(TARGETS):
            flag_ptr = tl.load(flags_at_ptr + target).to(tl.pointer_type(tl.int32)) + program
            tl.atomic_xchg(flag_ptr, count, sem="release", scope="sys")
        tl.store(sent_ptr + program, count)
    if SOURCES > 0:
        wanted = tl.load(taken_ptr + program) + 1
        read_ptr = slots_ptr + tl.cast(wanted % 2, tl.int64) * read_turn_elements
        for source in tl.static_range(SOURCES):
            if not spin_until(flags_ptr + source * PROGRAMS + program, wanted, max_spins):
                tl.store(error_ptr, CODE)
        for start in range(program * BLOCK, part_elements, PROGRAMS * BLOCK):
            place = start + lane
            inside = place < part_elements
            added = tl.zeros([BLOCK], tl.float32)
            for source in tl.static_range(SOURCES):
                posted_ptr = read_ptr + tl.cast(source, tl.int64) * slot_elements + place
                posted = tl.load(posted_ptr, mask=inside, other=0.0, cache_modifier=".cg")
                if TOTAL:
                    added += posted.to(tl.float32)
                else:
                    tl.store(out_ptr + source * part_elements + place, posted, mask=inside)
            if TOTAL:
                tl.store(out_ptr + place, added.to(kind), mask=inside)
        tl.store(taken_ptr + program, wanted)


def post(outbox: Outbox, x: torch.Tensor, per_part: int = 0) -> None:
    """See :func:`kernels.exchange.post`."""
    x = x.contiguous()
    _run(outbox, None, x, x, _part_elements(outbox, x, per_part), False, per_part, 0)


def collect(inbox: Inbox, rows: int, width: int, total: bool, max_spins: int) -> torch.Tensor:
    """See :func:`kernels.exchange.collect`."""
    out = _result(inbox, rows, width, total)
    _run(None, inbox, out, out, rows * width, total, 0, max_spins)
    return out


def exchange(outbox: Outbox, inbox: Inbox, x: torch.Tensor, total: bool, per_part: int, max_spins: int) -> torch.Tensor:
    """See :func:`kernels.exchange.exchange`."""
    x = x.contiguous()
    part_elements = _part_elements(outbox, x, per_part)
    out = _result(inbox, part_elements // x.shape[1], x.shape[1], total)
    _run(outbox, inbox, x, out, part_elements, total, per_part, max_spins)
    return out


def _part_elements(outbox: Outbox, x: torch.Tensor, per_part: int) -> int:
    return x.numel() * per_part // len(outbox.inboxes) if per_part else x.numel()


def _result(inbox: Inbox, rows: int, width: int, total: bool) -> torch.Tensor:
    slots = inbox.slots
    return torch.empty(rows if total else inbox.sources * rows, width, dtype=slots.dtype, device=slots.device)


def _run(
    outbox: Outbox | None,
    inbox: Inbox | None,
    x: torch.Tensor,
    out: torch.Tensor,
    part_elements: int,
    total: bool,
    per_part: int,
    max_spins: int,
) -> None:
    slot_elements = (inbox or outbox.inboxes[0]).slots.shape[2]
    unused = inbox.taken if inbox else outbox.sent  # a pointer that nothing reads
    sending = (outbox.slots_at, outbox.flags_at, outbox.sent) if outbox else (unused,) * 3
    reading = (inbox.slots, inbox.flags, inbox.taken, inbox.error) if inbox else (unused,) * 4
    programs = programs_for(slot_elements)
    launch(
        _exchange_kernel,
        (programs,),
        x,
        out,
        *sending,
        *reading,
        part_elements,
        outbox.inboxes[0].slots.stride(0) if outbox else 0,
        inbox.slots.stride(0) if inbox else 0,
        slot_elements,
        max_spins,
        TARGETS=len(outbox.inboxes) if outbox else 0,
        SOURCES=inbox.sources if inbox else 0,
        PER_PART=per_part,
        TOTAL=total,
        PROGRAMS=programs,
        BLOCK=BLOCK,
        CODE=TIMED_OUT,
        num_warps=4,
    )
