"""Rings and mailboxes: what goes in comes out, in order, whatever the sizes; a full ring refuses instead of losing."""

import os
import threading
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from serving.shm.bell import Bell
from serving.shm.mailbox import Mailbox, MailboxShape
from serving.shm.region import SharedRegion
from serving.shm.ring import BelledRing, Ring

pytestmark = pytest.mark.cpu


@given(st.lists(st.one_of(st.none(), st.binary(max_size=90)), max_size=80), st.integers(200, 400))
def test_messages_come_out_in_order_and_none_is_lost(actions, size):
    region = SharedRegion(size)
    writer, reader = Ring(region), Ring(region)
    expected = []
    for message in actions:
        if message is None:
            assert reader.pop() == (expected.pop(0) if expected else None)
        elif writer.push(message):
            expected.append(message)
        else:
            used = sum(4 + len(pending) for pending in expected)
            assert used + 4 + len(message) > size - 128
    assert [reader.pop() for _ in expected] == expected
    assert reader.empty
    for ring in (writer, reader):
        ring.release()
    region.close()


def test_a_message_that_can_never_fit_is_an_error():
    region = SharedRegion(256)
    ring = Ring(region)
    with pytest.raises(ValueError, match="exceeds"):
        ring.push(bytes(200))
    ring.release()
    region.close()


def test_who_waits_for_a_message_is_woken_by_it_and_misses_none():
    """Each message comes when the reader sleeps, is about to, or looks: it must never sleep as long as it is allowed to."""
    region, bell, longest_s = SharedRegion(4096), Bell(), 60.0
    other = Bell(os.dup(bell.fd))
    writer, reader = BelledRing(region, bell), BelledRing(region, other)
    sent = [bytes([number]) * (number % 7) for number in range(200)]

    def write():
        for number, message in enumerate(sent):
            time.sleep(0.0005 * (number % 3))
            while not writer.push(message):
                time.sleep(0)

    thread, received, began_s = threading.Thread(target=write), [], time.monotonic()
    thread.start()
    while len(received) < len(sent):
        reader.wait(longest_s)
        while (message := reader.pop()) is not None:
            received.append(message)
    thread.join()
    assert received == sent
    assert time.monotonic() - began_s < longest_s
    for ring in (writer, reader):
        ring.release()
    region.close()
    bell.close()
    other.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mailbox_carries_rows_of_different_models_both_ways(dtype):
    shape = MailboxShape(slots=2, slot_bytes=7 * 33 * 4)
    region = SharedRegion(shape.region_bytes)
    near, far = Mailbox(region, shape), Mailbox(region, shape)
    assert far.receive(0) is None and near.done(0)
    for exchange, (slot, rows, hidden) in enumerate([(0, 7, 33), (1, 1, 8), (0, 3, 16), (1, 7, 33)]):
        sent = torch.randn(rows, hidden).to(dtype)
        near.send(slot, model=exchange, layer=exchange + 5, rows=sent)
        assert not near.done(slot)
        assert far.receive(1 - slot) is None
        assert far.receive(slot) == (exchange, exchange + 5, rows)
        assert far.receive(slot) is None
        inbound, outbound = far.views(slot, rows, hidden, dtype)
        assert torch.equal(inbound, sent)
        outbound.copy_(inbound * 2)
        far.publish(slot)
        assert near.done(slot)
        assert torch.equal(near.result(slot, rows, hidden, dtype), sent * 2)
