"""Exchanges: what each side is sent is what it collects, gathered or summed in order, and a wait for nothing ends with a code."""

from __future__ import annotations

import pytest
import torch

from kernels.exchange import TIMED_OUT, Inbox, Outbox, reference, symmetric

pytestmark = pytest.mark.cpu

SHAPES = ((1, 40), (9, 24), (5, 7), (3, 1000))  # of a slot of 3,000 elements: three programs


@pytest.fixture(params=["reference", "triton"])
def form(request, device):
    if request.param == "reference":
        return reference
    from kernels.exchange import triton

    return triton


def _ends(members: int, dtype: torch.dtype, device: torch.device) -> list[tuple[Outbox, Inbox]]:
    return symmetric([device] * members, 3000, dtype)


def _errors(ends: list[tuple[Outbox, Inbox]]) -> list[int]:
    return [int(inbox.error.item()) for _, inbox in ends]


@pytest.mark.parametrize("members", [2, 3])
def test_all_get_the_sum_and_all_rows_fill_after_fill(form, members, dtype, device, check):
    ends = _ends(members, dtype, device)
    for rows, width in SHAPES:
        for total in (True, False):
            sent = [torch.randn(rows, width + 3, dtype=dtype, device=device)[:, :width] for _ in ends]
            for (outbox, _), x in zip(ends, sent, strict=True):
                form.post(outbox, x)
            expected = torch.stack(sent).float().sum(0).to(dtype) if total else torch.cat(sent)
            for _, inbox in ends:
                check("collected", form.collect(inbox, rows, width, total, 10), expected)
    assert not any(_errors(ends))


@pytest.mark.parametrize("per_part", [1, 2])
def test_each_is_sent_its_part_of_the_rows(form, per_part, device, check):
    members, rows, width = 4, 3, 50
    ends = _ends(members, torch.float32, device)
    sent = [torch.randn(members // per_part * rows, width, device=device) for _ in ends]
    for (outbox, _), x in zip(ends, sent, strict=True):
        form.post(outbox, x, per_part)
    for member, (_, inbox) in enumerate(ends):
        first = member // per_part * rows
        expected = torch.stack([x[first : first + rows] for x in sent]).sum(0)
        check("part", form.collect(inbox, rows, width, True, 10), expected)
    assert not any(_errors(ends))


def test_one_launch_posts_and_collects(form, device, check):
    """In one thread only the last to come finds what all have posted; the others give up, and say so."""
    ends = _ends(3, torch.float32, device)
    sent = list(torch.randn(3, 4, 100, device=device))
    results = [form.exchange(*end, x, True, 0, 10) for end, x in zip(ends, sent, strict=True)]
    check("sum", results[-1], sum(sent[1:], sent[0]))
    assert _errors(ends) == [TIMED_OUT, TIMED_OUT, 0]


def test_a_question_to_several_and_their_answers_added_up(form, device, check):
    """The shape of a pool boundary behind which an FFN is cut by width: one asks, each of three answers a partial sum."""
    asked = [Inbox.allocate(1, 640, torch.float32, device) for _ in range(3)]
    answers = Inbox.allocate(3, 640, torch.float32, device)
    question = Outbox.into(asked, [0, 0, 0], device)
    replies = [Outbox.into([answers], [place], device) for place in range(3)]
    for rows in (1, 5, 2):
        x = torch.randn(rows, 128, device=device)
        form.post(question, x)
        for factor, (inbox, reply) in enumerate(zip(asked, replies, strict=True), start=1):
            form.post(reply, factor * form.collect(inbox, rows, 128, False, 10))
        check("answer", form.collect(answers, rows, 128, True, 10), 6 * x)
    assert not answers.error.item()
    x = torch.randn(5, 128, device=device)
    form.exchange(
        question, answers, x, True, 0, 10
    )  # asked in the one launch that a step has, it gives up in this thread
    for inbox in asked:
        check("question", form.collect(inbox, 5, 128, False, 10), x)
    assert answers.error.item() == TIMED_OUT
    assert not any(inbox.error.item() for inbox in asked)


def test_a_wait_for_nothing_gives_up_with_a_code(form, device):
    ((outbox, inbox),) = _ends(1, torch.float32, device)
    form.exchange(outbox, inbox, torch.ones(1, 4, device=device), True, 0, 10)
    assert inbox.error.item() == 0
    form.collect(inbox, 1, 4, True, 10)
    assert inbox.error.item() == TIMED_OUT


def test_inboxes_of_one_writer_have_one_shape(device):
    inboxes = [Inbox.allocate(1, size, torch.float32, device) for size in (64, 128)]
    with pytest.raises(ValueError, match="one shape"):
        Outbox.into(inboxes, [0, 0], device)
