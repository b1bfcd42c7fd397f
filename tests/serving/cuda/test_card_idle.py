"""Engines whose idle weights leave a card and come back: greedy tokens equal the judge's, what the weights leave is KV of the others,
and a model that is asked for again gets its room though the others' KV has grown into it."""

import random
import time

import judges
import pytest
import torch
from served import OPTIONS, served, with_kv_pages

from serving import registry
from serving.checkpoints.make import make_checkpoint
from serving.generate import cuda_cluster, generate
from serving.interface import Demand, EventKind, Request

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch sees none"),
]

MEMORY_BYTES = 4 << 30
PAGE_BYTES = OPTIONS["page_bytes"]
IDLE_S = 0.4
PAIRS = {
    "mixtral+deepseek_v2": ("tiny", 4),
    "deepseek+qwen3_moe": ("tiny", 4),
    "glm4_moe_lite+mixtral": ("tiny", 4),
    "mixtral+qwen3_moe": ("100m", 8),  # layers that run while later ones still come
}  # and pages of KV: those of one sequence, while both models' weights are there


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, tiny_checkpoints):
    root = tmp_path_factory.mktemp("wide")
    wide = {
        name: make_checkpoint(name, "100m", root / name, seed=1, progress=False) for name in ("mixtral", "qwen3_moe")
    }
    return {"tiny": tiny_checkpoints, "100m": wide}


def requests_for(model, count, new_tokens, rng, first_id):
    """Of one token, of more than two chunks, and of lengths between."""
    lengths = [1, 37, *(rng.randint(2, 48) for _ in range(count))][:count]
    return [
        Request(
            first_id + i, model.name, tuple(rng.randrange(model.spec.vocab_size) for _ in range(length)), new_tokens
        )
        for i, length in enumerate(lengths)
    ]


def serve(system, first, later, after_tokens):
    """Send `first`, and `later` once those have given `after_tokens` tokens; returns the tokens of all."""
    tokens, ended, given = {request.request_id: [] for request in first + later}, set(), 0
    for request in first:
        system.submit(request)
    deadline_s = time.monotonic() + 120
    while len(ended) < len(tokens):
        for event in system.poll():
            tokens[event.request_id].extend(event.tokens)
            given += len(event.tokens)
            if event.kind.terminal:
                assert event.kind is EventKind.COMPLETED, event.reason
                ended.add(event.request_id)
        if given >= after_tokens:
            for request in later:
                system.submit(request)
            later = []
        assert time.monotonic() < deadline_s, f"requests {sorted(set(tokens) - ended)} have not ended"
        time.sleep(0.0005)
    return tokens


def check(requests, tokens, checkpoints):
    for request in requests:
        found = tokens[request.request_id]
        assert len(found) == request.max_new_tokens
        directory = checkpoints[request.model]
        assert judges.greedy_agrees(directory, request.prompt, tuple(found)), f"{request.model}, {len(request.prompt)}"


@pytest.mark.parametrize("pair", PAIRS)
def test_weights_that_left_and_came_back_change_no_token(pair, checkpoints):
    size, pages = PAIRS[pair]
    models = served(checkpoints[size], pair.split("+"))
    system = registry.create("elastic-placement", {**OPTIONS, "idle_evict_s": IDLE_S, "prompts_at_once": 8})
    placement = system.plan(cuda_cluster(1, MEMORY_BYTES), models, Demand())
    rng = random.Random(pair)
    try:
        system.start(with_kv_pages(placement, pages, PAGE_BYTES))
        for turn in range(4):
            burst = requests_for(models[turn % 2], 6, 9, rng, first_id=10 * turn)
            check(burst, generate(system, burst), checkpoints[size])
            time.sleep(1.5 * IDLE_S)
        system.pool_samples()
        busy, asked = (
            requests_for(m, n, 50, rng, 100 * (1 + i)) for i, (m, n) in enumerate(zip(models, (16, 3), strict=True))
        )
        tokens = serve(system, busy, asked, after_tokens=60)
        used = [sample.pages_in_use.get(models[0].name, 0) for sample in system.pool_samples()]
        (device,) = system.stats()
    finally:
        system.stop()
    assert not judges.worker_processes()
    check(busy + asked, tokens, checkpoints[size])
    assert max(used) > pages, "KV has grown into what idle weights left"
    assert device.swaps >= 5, "each model was idle long enough after each of its bursts"
    assert device.switch_ns["weights"] > 0
    assert device.switch_ns["queue"] > 0, "a load had to wait for KV to go"
