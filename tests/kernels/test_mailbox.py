"""Mailboxes: what is put is what is waited for, in order, and a wait for what never comes ends with an error code."""

from __future__ import annotations

import pytest
import torch

from kernels.mailbox import TIMED_OUT, Mailbox, reference

pytestmark = pytest.mark.cpu


@pytest.fixture(params=["reference", "triton"])
def form(request, device):
    if request.param == "reference":
        return reference
    from kernels.mailbox import triton

    return triton


def test_rows_arrive_in_order(form, dtype, device, check):
    mailbox = Mailbox.allocate(3, 9, 40, dtype, device)
    for rows, width in ((1, 40), (9, 24), (5, 7)):
        sent = torch.randn(rows, width + 3, dtype=dtype, device=device)[:, :width]
        form.put(mailbox, 1, sent)
        check("rows", form.wait(mailbox, 1, rows, width, 10), sent.contiguous())
    assert mailbox.error.item() == 0
    assert mailbox.published.tolist() == mailbox.sent.tolist() == mailbox.taken.tolist() == [0, 3, 0]


def test_slots_do_not_touch(form, device, check):
    mailbox = Mailbox.allocate(2, 4, 8, torch.float32, device)
    first, second = torch.randn(2, 4, 8, device=device)
    form.put(mailbox, 0, first)
    form.put(mailbox, 1, second)
    check("second", form.wait(mailbox, 1, 4, 8, 10), second)
    check("first", form.wait(mailbox, 0, 4, 8, 10), first)


def test_a_wait_for_nothing_gives_up_with_a_code(form, device):
    mailbox = Mailbox.allocate(1, 1, 4, torch.float32, device)
    form.put(mailbox, 0, torch.ones(1, 4, device=device))
    form.wait(mailbox, 0, 1, 4, 10)
    assert mailbox.error.item() == 0
    form.wait(mailbox, 0, 1, 4, 10)
    assert mailbox.error.item() == TIMED_OUT
