"""Memory of a card that engines share, with the driver's calls played by the host's memory: what is created is bounded by what the
ledger lends, weights that leave come back whole over other memory, and an engine never steps without them."""

import contextlib
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from served import served

from serving.batching import StepLimits
from serving.checkpoints import open_weights
from serving.cuda import driver
from serving.cuda.lent_weights import CardWeights, build_lent_weights_worker
from serving.cuda.memory import CardMemory, LentPages
from serving.cuda.residency import CardArena, CardLoader
from serving.errors import CapacityError
from serving.interface import Device
from serving.memory.kv_pool import KVPool
from serving.memory.lent import LentShape, SharedPageLender
from serving.memory.virtual import PhysicalPages, VirtualRange
from serving.residency.image import CARD_FRAME_BYTES, num_units, placed_bytes
from serving.residency.lent_weights import LentWeights
from serving.shm.bell import Bell
from serving.shm.region import SharedRegion
from serving.shm.ring import BelledRing, Ring
from serving.spec import spec_from_config
from serving.workers.config import LentRef, ModelWorkerConfig, PoolConfig, RegionRef
from serving.workers.counters import REGION_BYTES, Counters
from serving.workers.messages import Stop, Submit, Tokens, decode, encode

pytestmark = pytest.mark.cpu

PAGE_BYTES = driver.GRANULARITY_BYTES
HERE = torch.device("cpu")


class HostDriver:
    """The driver's calls over memory files and address space of this process; `created_bytes` are not released yet."""

    GRANULARITY_BYTES = PAGE_BYTES

    def __init__(self):
        self._pages, self._ranges, self._handles = {}, {}, 0
        self.created_bytes = 0

    def granularity_bytes(self, device):
        return PAGE_BYTES

    def create(self, device, size_bytes):
        self._handles += 1
        self._pages[self._handles] = PhysicalPages(1, size_bytes)
        self.created_bytes += size_bytes
        return self._handles

    def release(self, handle):
        pages = self._pages.pop(handle)
        self.created_bytes -= pages.page_bytes
        pages.close()

    def reserve(self, length_bytes):
        made = VirtualRange(length_bytes, align_bytes=PAGE_BYTES)
        self._ranges[made.address] = made
        return made.address

    def free_address(self, address, length_bytes):
        self._ranges.pop(address).close()

    def map_memory(self, address, size_bytes, handle):
        made = self._around(address)
        made.map(address - made.address, self._pages[handle], 0, 1)

    def unmap(self, address, length_bytes):
        made = self._around(address)
        made.unmap(address - made.address, length_bytes)

    def allow(self, device, address, length_bytes):
        self._around(address)

    def _around(self, address):
        return next(made for start, made in self._ranges.items() if start <= address < start + made.length_bytes)


class Copies:
    """Events of a stream whose copies end when the test says so."""

    ended = 0

    def __init__(self):
        self._place = 0

    def record(self, stream):
        self._place = stream.recorded = stream.recorded + 1

    def query(self):
        return self._place <= Copies.ended


@pytest.fixture
def host_driver(monkeypatch):
    made = HostDriver()
    monkeypatch.setattr("serving.cuda.memory.driver", made)
    monkeypatch.setattr("torch.cuda.set_device", lambda device: None)
    monkeypatch.setattr("torch.cuda.synchronize", lambda device=None: None)
    monkeypatch.setattr("torch.cuda.cudart", lambda: SimpleNamespace(cudaHostRegister=lambda *_: 0))
    monkeypatch.setattr("torch.cuda.Stream", lambda device: SimpleNamespace(recorded=0))
    monkeypatch.setattr("torch.cuda.stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr("torch.cuda.Event", Copies)
    monkeypatch.setattr(Copies, "ended", 1 << 30)
    return made


def ledger(pages, engines):
    shape = LentShape(pages, engines, 0)
    region = SharedRegion(shape.region_bytes)
    return region, [SharedPageLender(region, shape, engine) for engine in range(engines)]


def narrow_spec(name):
    """1,100 tokens of a layer in a page."""
    return spec_from_config(
        {
            "model_type": "mixtral", "num_hidden_layers": 2, "hidden_size": 64, "vocab_size": 64, "num_attention_heads": 4,
            "num_key_value_heads": 4, "head_dim": 60, "num_local_experts": 4, "num_experts_per_tok": 2,
            "intermediate_size": 32, "max_position_embeddings": 4000,
        },
        name,
    )  # fmt: skip


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 2), st.integers(0, 4000)), max_size=25))
def test_engines_create_no_more_than_they_are_lent_and_have_ready(host_driver, actions):
    spare, kept, pages = 2, 3, 14
    region, lenders = ledger(pages, 2)
    memory = CardMemory(HERE, lent=True)
    memory.pages = lambda count, page_bytes: LentPages(count, page_bytes, HERE, spare, kept)
    pools = [KVPool(pages, PAGE_BYTES, [(narrow_spec("m"), "float32")], 3, memory, lender) for lender in lenders]
    runs = [[pool.models["m"].open_run() for _ in range(3)] for pool in pools]
    marks = {}
    for engine, place, tokens in actions:
        kv, run = pools[engine].models["m"], runs[engine][place]
        if tokens <= run.mapped_tokens:
            kv.release(run)
            marks.pop((engine, place), None)
        else:
            with contextlib.suppress(CapacityError):
                kv.grow(run, tokens)
                marks[engine, place] = mark = float(1000 * engine + 10 * place + tokens)
                for layer in kv.layers:
                    layer[run.start_slot : run.start_slot + tokens] = mark
        lent = pages - lenders[0].free_pages
        anchors = len(pools)
        least, ready = lent + anchors, 2 * (spare + kept)
        assert least * PAGE_BYTES <= host_driver.created_bytes <= (least + ready) * PAGE_BYTES
    for (engine, place), mark in marks.items():
        for layer in pools[engine].models["m"].layers:
            assert layer[runs[engine][place].start_slot].eq(mark).all()
    for pool in pools:
        pool.close()
    assert host_driver.created_bytes == 0
    region.close()


def test_the_next_request_in_a_place_needs_no_call_of_the_driver(host_driver, monkeypatch):
    pool = KVPool(14, PAGE_BYTES, [(narrow_spec("m"), "float32")], 3, CardMemory(HERE))
    kv = pool.models["m"]
    first = kv.open_run()
    assert kv.grow(first, 2500) == 6
    kv.close_run(first)
    for call in ("create", "map_memory", "allow", "unmap"):
        monkeypatch.setattr(host_driver, call, None)
    second = kv.open_run()
    assert kv.grow(second, 1) == 0 and second.num_pages == 2
    assert kv.grow(second, 2500) == 0 and pool.lender.lent_pages == 6
    kv.close_run(second)
    assert pool.lender.lent_pages == 0
    monkeypatch.undo()


@pytest.mark.parametrize("architecture", ["mixtral", "glm4_moe_lite"])
def test_weights_leave_a_card_and_come_back_whole(architecture, host_driver, tiny_checkpoints):
    (model,) = served(tiny_checkpoints, (architecture,))
    taken = placed_bytes(model, "cuda", PAGE_BYTES) // PAGE_BYTES
    region, (lender, other) = ledger(taken + 5, 2)
    counters = Counters(SharedRegion(REGION_BYTES))
    arena = CardArena(placed_bytes(model, "cuda") // CARD_FRAME_BYTES, [model], HERE, kept=False)
    loader = CardLoader(arena, [0], HERE)
    weights = LentWeights(CardWeights(arena, loader, taken), lender, counters)
    assert host_driver.created_bytes == 0 and lender.lent_pages == taken
    image = arena.open(0)
    image.build(open_weights(model))
    whole = image.bytes[: image.used_bytes].clone()
    arena.evict(0)
    weights.start()
    assert host_driver.created_bytes == taken * PAGE_BYTES
    assert image.bytes[: image.used_bytes].equal(whole)
    assert loader.arriving(0) is None

    weights.evict()
    assert host_driver.created_bytes == 0 and lender.lent_pages == 0
    others = other.lend(6)
    assert not weights.bring(), "another engine has taken a page too many"
    assert other.unclaimed_pages == 0, "what comes free is claimed"
    other.give_back(others[:1])
    Copies.ended = 1
    assert weights.bring(), "a step may begin, and waits layer by layer"
    assert len(loader.arriving(0)) == num_units(model)
    weights.poll()
    assert counters.read()["swaps"] == 0
    Copies.ended = num_units(model) * 10
    weights.poll()
    assert loader.arriving(0) is None
    assert image.bytes[: image.used_bytes].equal(whole)
    counted = counters.read()
    assert counted["swaps"] == 1 and counted["loaded_bytes"] == image.used_bytes
    assert min(counted[f"switch_{part}_ns"] for part in ("queue", "weights", "evict")) > 0
    region.close()


class PlayedRunner:
    """Steps that are done at once and whose tokens are 5; each reads the weights, which is a fault where they are not."""

    bytes_crossed = 0

    def __init__(self, models, lanes, limits, control, residency):
        self._attention, self.embedded = models[0].attention, []
        with residency.present(0):
            self._attention.embed(torch.tensor([0]))

    def launch(self, lane, model, plan):
        self.embedded.append((plan.token_ids, self._attention.embed(torch.tensor(plan.token_ids)).clone()))
        self._tokens = [5] * len(plan.logit_rows)

    def done(self, lane):
        return True

    def result(self, lane):
        return self._tokens

    def close(self):
        """Nothing runs."""


def comes_true(condition, within_s=20.0):
    deadline_s = time.monotonic() + within_s
    while not condition() and time.monotonic() < deadline_s:
        time.sleep(0.001)
    return condition()


def test_an_engine_lets_its_idle_weights_go_and_steps_when_they_are_back(host_driver, tiny_checkpoints, monkeypatch):
    (model,) = served(tiny_checkpoints, ("mixtral",))
    for name, value in {
        "prepare_process": lambda mps: None,
        "card": lambda device: HERE,
        "StepRunner": PlayedRunner,
    }.items():
        monkeypatch.setattr(f"serving.cuda.lent_weights.{name}", value)
    monkeypatch.setattr("serving.cuda.build.card", lambda device: HERE)
    taken, kv_pages = placed_bytes(model, "cuda", PAGE_BYTES) // PAGE_BYTES, 6
    region, (_, other) = ledger(taken + kv_pages, 2)
    shape = LentShape(taken + kv_pages, 2, 0)
    control, tokens = BelledRing(SharedRegion(1 << 16), Bell()), Ring(SharedRegion(1 << 16))
    counters = Counters(SharedRegion(REGION_BYTES))
    role = ModelWorkerConfig(
        Device("gpu0", "cuda", 0, 1 << 30),
        (model,),
        (PoolConfig("m", kv_pages, PAGE_BYTES, (0,), 4),),
        StepLimits(4, 16),
        1,
        (-1,),
        (-1,),
        growth="preempt",
        lent=LentRef(RegionRef(region.fd, shape.region_bytes), region.fd, shape, 0),
        evict_idle_s=0.05,
    )
    wires = SimpleNamespace(control=control, tokens=tokens, counters=counters, recorder=None)
    worker = build_lent_weights_worker(role, wires)
    anchor, ready = 1, kv_pages  # free pages that are mapped for the first requests
    assert host_driver.created_bytes == (taken + anchor + ready) * PAGE_BYTES
    thread = threading.Thread(target=worker.run)
    thread.start()
    try:
        assert comes_true(lambda: other.free_pages == shape.num_pages), "idle weights have left"
        assert comes_true(lambda: host_driver.created_bytes == (anchor + ready) * PAGE_BYTES)
        others = other.lend(kv_pages + 1)
        control.push(encode(Submit(3, 0, (1, 2, 3, 4), 2, ())))
        assert comes_true(lambda: other.unclaimed_pages == 0), "a load waits for a page"
        assert counters.read()["steps"] == 0
        other.give_back(others)
        given = []

        def ended():
            while (data := tokens.pop()) is not None:
                message = decode(data)
                given.extend(message.items if isinstance(message, Tokens) else ())
            return len(given) == 2

        assert comes_true(ended)
        assert given == [(3, 5, False), (3, 5, True)]
        assert comes_true(lambda: other.free_pages == shape.num_pages), "idle again"
    finally:
        control.push(encode(Stop()))
        thread.join(20)
    assert not thread.is_alive()
    counted = counters.read()
    assert counted["swaps"] == 1 and counted["steps"] == 2 and counted["switch_queue_ns"] > 0
    with open_weights(model) as weights:
        stored = weights.embedding()
        runner = worker._runner
        for ids, rows in runner.embedded:
            assert rows.equal(stored[torch.tensor(ids)].to(rows.dtype))
