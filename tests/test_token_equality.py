"""The judge of every engine path: greedy tokens equal `transformers` in float32 (a plain reference for `deepseek`).

Each system serves ragged batches of one to eight requests, prompts longer than a prefill chunk, and two models at once,
on every architecture; afterwards no page, process, descriptor or shared memory is left.
"""

import contextlib
import dataclasses
import gc
import os
import random
import time
from collections import Counter

import judges
import pytest
from served import served, with_kv_pages

from serving import registry
from serving.generate import cpu_cluster, generate
from serving.interface import Demand, Request
from serving.spec import ARCHITECTURES

pytestmark = pytest.mark.cpu

CHUNK = 16
MEMORY_BYTES = 64 << 20
SCARCE_PAGES = 40
OPTIONS = {"max_batch": 8, "prefill_chunk": CHUNK, "page_bytes": 4096}
SYSTEMS = {
    "crosspool": ("crosspool", {**OPTIONS, "chunks_in_flight": 2}),
    "crosspool-1-lane": ("crosspool", {**OPTIONS, "lanes": 1}),
    "crosspool-3-lanes": ("crosspool", {**OPTIONS, "lanes": 3, "max_batch": 2, "chunks_in_flight": 3}),
    "crosspool-a-lane-a-model": ("crosspool", {**OPTIONS, "lanes": 3, "lanes_of_model": 1}),
    "crosspool-host-driven": ("crosspool", {**OPTIONS, "control": "host", "chunks_in_flight": 2}),
    "elastic": ("elastic", OPTIONS),
    "static": ("static", OPTIONS),
}
PAIRS = [("mixtral", "deepseek_v2"), ("deepseek", "qwen3_moe"), ("glm4_moe_lite", "mixtral")]


def open_descriptors() -> Counter[str]:
    """What this process has open."""
    gc.collect()  # what earlier tests left to be collected must not be while one counts
    found: Counter[str] = Counter()
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the listing's own
            found[os.readlink(f"/proc/self/fd/{number}")] += 1
    return found


def descriptors_left(before: Counter[str]) -> list[str]:
    """What is open now and was not then; what somebody else has closed meanwhile does not matter."""
    return sorted((open_descriptors() - before).elements())


def ragged_requests(model, count, rng, first_id=0):
    """`count` requests of different lengths; the first is one token long, the second longer than two chunks."""
    lengths = ([1, 2 * CHUNK + 5] + [rng.randint(2, 3 * CHUNK) for _ in range(count)])[:count]
    return [
        Request(
            request_id=first_id + i,
            model=model.name,
            prompt=tuple(rng.randrange(model.spec.vocab_size) for _ in range(length)),
            max_new_tokens=rng.randint(1, 9),
        )
        for i, length in enumerate(lengths)
    ]


def pages_are_returned(system, within_s=5.0):
    """Whether the newest sample of every pool comes to say that no page is in use: it may lag behind the last token."""
    deadline, in_use = time.monotonic() + within_s, {}
    while time.monotonic() < deadline:
        in_use |= {sample.device: sum(sample.pages_in_use.values()) for sample in system.pool_samples()}
        if in_use and not any(in_use.values()):
            return True
        system.poll()
        time.sleep(0.01)
    return False


def assert_equal_to_judge(requests, tokens, checkpoints):
    for request in requests:
        directory, found = checkpoints[request.model], tokens[request.request_id]
        if len(found) == request.max_new_tokens and judges.greedy_agrees(directory, request.prompt, found):
            continue
        expected = judges.greedy_reference(directory, request.prompt, request.max_new_tokens)
        assert found == expected, f"{request.model}, prompt of {len(request.prompt)} tokens"


@pytest.mark.parametrize("system_name", SYSTEMS)
def test_tokens_equal_the_judge_and_nothing_is_left(system_name, tiny_checkpoints):
    """All architectures from one start, of which two are asked at a time: the first alone, then both at once."""
    name, options = SYSTEMS[system_name]
    descriptors = open_descriptors()
    models = {model.name: model for model in served(tiny_checkpoints, ARCHITECTURES)}
    system = registry.create(name, options)
    try:
        system.start(system.plan(cpu_cluster(2, MEMORY_BYTES), list(models.values()), Demand()))
        for pair in PAIRS:
            first, second = (models[architecture] for architecture in pair)
            rng = random.Random(f"{system_name}{pair}")
            for count in (1, 2, 5, 8):
                alone = ragged_requests(first, count, rng)
                assert_equal_to_judge(alone, generate(system, alone), tiny_checkpoints)
            both = ragged_requests(first, 5, rng) + ragged_requests(second, 6, rng, first_id=100)
            rng.shuffle(both)
            assert_equal_to_judge(both, generate(system, both), tiny_checkpoints)
            assert pages_are_returned(system)
    finally:
        system.stop()
    assert not judges.worker_processes()
    assert descriptors_left(descriptors) == []


def test_every_architecture_is_judged():
    assert {name for pair in PAIRS for name in pair} == set(ARCHITECTURES)


@pytest.mark.parametrize("system_name", ["crosspool", "static"])
def test_scarce_kv_queues_and_still_computes_the_same(system_name, tiny_checkpoints):
    """A pool that holds a few requests at a time: the others wait, none is lost, tokens do not change."""
    models = served(tiny_checkpoints, ["mixtral", "qwen3_moe"])
    system = registry.create(system_name, OPTIONS)
    placement = system.plan(cpu_cluster(2, MEMORY_BYTES), models, Demand())
    placement = with_kv_pages(placement, SCARCE_PAGES, OPTIONS["page_bytes"])
    rng = random.Random(7)
    requests = ragged_requests(models[0], 7, rng) + ragged_requests(models[1], 7, rng, first_id=50)
    try:
        system.start(placement)
        assert_equal_to_judge(requests, generate(system, requests), tiny_checkpoints)
        samples = system.pool_samples()
        assert max(sum(sample.pages_in_use.values()) for sample in samples) <= SCARCE_PAGES * len(models)
    finally:
        system.stop()


@pytest.mark.parametrize("system_name", ["elastic", "elastic-placement", "quota"])
@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_preemption_and_recomputation_change_no_token(system_name, pair, tiny_checkpoints):
    """Engines that take what they find run out of pages: the youngest lose theirs, and are computed again."""
    models = served(tiny_checkpoints, pair)
    system = registry.create(system_name, {**OPTIONS, "admission": "optimistic"})
    placement = system.plan(cpu_cluster(1, MEMORY_BYTES), models, Demand())
    placement = with_kv_pages(placement, SCARCE_PAGES // 2, OPTIONS["page_bytes"])
    rng = random.Random(11)
    requests = [
        dataclasses.replace(request, prompt=request.prompt[:9], max_new_tokens=24)
        for first, model in enumerate(models)
        for request in ragged_requests(model, 5, rng, first_id=50 * first)
    ]
    try:
        system.start(placement)
        assert_equal_to_judge(requests, generate(system, requests), tiny_checkpoints)
        assert sum(device.preemptions for device in system.stats()) > 0
        assert pages_are_returned(system)
    finally:
        system.stop()
    assert not judges.worker_processes()


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_weights_that_left_and_came_back_in_mid_trace_change_no_token(pair, tiny_checkpoints):
    """Every model idles long enough to lose its weights while the other is busy, is asked again, and finds room for them
    where the other's KV has grown."""
    models = served(tiny_checkpoints, pair)
    system = registry.create("elastic-placement", {**OPTIONS, "idle_evict_s": 0.2, "prompts_at_once": 8})
    placement = system.plan(cpu_cluster(1, MEMORY_BYTES), models, Demand())
    placement = with_kv_pages(placement, SCARCE_PAGES, OPTIONS["page_bytes"])
    rng = random.Random(13)
    bursts = [ragged_requests(models[turn % 2], 6, rng, first_id=10 * turn) for turn in range(4)]
    both = ragged_requests(models[0], 4, rng, first_id=100) + ragged_requests(models[1], 4, rng, first_id=200)
    try:
        system.start(placement)
        for requests in bursts:
            assert_equal_to_judge(requests, generate(system, requests), tiny_checkpoints)
            time.sleep(0.3)
        assert_equal_to_judge(both, generate(system, both), tiny_checkpoints)
        (device,) = system.stats()
        assert device.swaps >= 4 and device.switch_ns["weights"] > 0
        pages = system.notes()["pages"]
        assert pages["mapped"] > 0 and 0 < pages["share_of_busy"] < 1
        assert pages_are_returned(system)
    finally:
        system.stop()
    assert not judges.worker_processes()


def test_tokens_flow_while_another_request_waits(tiny_checkpoints):
    """Continuous batching: a request that comes later joins at the next step, and a short one leaves early."""
    models = served(tiny_checkpoints, ["deepseek_v2"])
    system = registry.create("crosspool", OPTIONS)
    rng = random.Random(3)
    prompt = tuple(rng.randrange(models[0].spec.vocab_size) for _ in range(11))
    long, short = Request(0, "deepseek_v2", prompt, 60), Request(1, "deepseek_v2", prompt[:5], 2)
    finished = []
    try:
        system.start(system.plan(cpu_cluster(2, MEMORY_BYTES), models, Demand()))
        system.submit(long)
        deadline = time.monotonic() + 60
        while len(finished) < 2 and time.monotonic() < deadline:
            for event in system.poll():
                if event.tokens and short is not None:
                    system.submit(short)
                    short = None
                if event.kind.terminal:
                    finished.append(event.request_id)
            time.sleep(0.0005)
    finally:
        system.stop()
    assert finished == [1, 0]
