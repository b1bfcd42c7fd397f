"""Ports to an FFN across the pool boundary: an answer stays until it is taken, however often a lane asks for it."""

import pytest
import torch

from serving.shm.mailbox import Mailbox, MailboxShape
from serving.shm.region import SharedRegion
from serving.workers.config import Bells
from serving.workers.doorbell import answered, ring
from serving.workers.ports import RelayedFFN, RemoteFFN, SpreadFFN

pytestmark = pytest.mark.cpu

SHAPE = MailboxShape(slots=2, slot_bytes=3 * 5 * 4)
PORTS = ("lowered", "host-driven", "spread, lowered", "spread, host-driven")


class FarSide:
    """What stands behind a port: an FFN that doubles rows, with the relay where control is host-driven."""

    def __init__(self, bells):
        self.region, self._bells = SharedRegion(SHAPE.region_bytes), bells
        self.box = Mailbox(self.region, SHAPE)
        self._told: set[int] = set()

    def answer(self, lane):
        _, _, rows = self.box.receive(lane)
        inbound, outbound = self.box.views(lane, rows, 5, torch.float32)
        outbound.copy_(2 * inbound)
        self.box.publish(lane)
        if self._bells is not None:
            self._told.update(answered(self._bells.attention_to_relay.read_fd, 0.0))
            assert lane in self._told
            ring(self._bells.relay_to_attention.write_fd, lane)


@pytest.fixture(params=PORTS)
def port_and_sides(request):
    count = 2 if "spread" in request.param else 1
    bells = [Bells.new() if "host" in request.param else None for _ in range(count)]
    sides = [FarSide(one) for one in bells]
    boxes = [Mailbox(side.region, SHAPE) for side in sides]
    ports = [RemoteFFN(box) if one is None else RelayedFFN(box, one) for box, one in zip(boxes, bells, strict=True)]
    legs = {0: [[(number, 0) for number in range(count)]] * 2}
    yield ports[0] if count == 1 else SpreadFFN(ports, legs, lanes=SHAPE.slots), sides
    for one in filter(None, bells):
        for doorbell in one.doorbells:
            doorbell.close()


def test_an_answer_is_there_until_it_is_taken(port_and_sides):
    """A lane that must wait for another one, whose KV it reads, asks more than once."""
    port, sides = port_and_sides
    for layer in range(2):
        sent = [torch.randn(rows, 5) for rows in (3, 1)]
        for lane, rows in enumerate(sent):
            port.send(lane, 0, layer, rows)
        assert not port.done(0) and not port.done(1)
        for lane in (1, 0):
            for side in sides:
                side.answer(lane)
            port.rest()
            assert all(port.done(lane) for _ in range(3))
        for lane, rows in enumerate(sent):
            assert port.done(lane)
            assert torch.equal(port.result(lane), 2 * len(sides) * rows)
