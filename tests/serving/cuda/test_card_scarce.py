"""Multiplexed engines on a card where KV is scarce: quotas move, the youngest are preempted and computed again, and greedy tokens
equal the judge's all the same. A page is 2 MiB of one layer, so sequences are as long as that takes."""

import random

import judges
import pytest
import torch
from served import OPTIONS, served, with_kv_pages

from serving import registry
from serving.checkpoints.make import make_checkpoint
from serving.generate import cuda_cluster, generate
from serving.interface import Demand, Request

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch sees none"),
]

MEMORY_BYTES = 4 << 30
PAGE_BYTES = OPTIONS["page_bytes"]
LONG, SHORT = "deepseek", "mixtral"  # 512 and 2,048 tokens of a layer in a page, 8 layers each
SCARCE_PAGES = 40  # of which the first has 32, four sequences before each needs a second page a layer
OPTIONS_OF = {
    "elastic": {"admission": "optimistic"},
    "elastic-placement": {"admission": "optimistic", "idle_evict_s": 0, "prompts_at_once": 16},
    "quota": {"quotas": {LONG: 0.8, SHORT: 0.2}, "adapt_every_s": 0.02},
}


@pytest.fixture(scope="module")
def wide_checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("wide")
    return {name: make_checkpoint(name, "100m", root / name, seed=1, progress=False) for name in (LONG, SHORT)}


def growing_requests(models):
    """Long ones that begin within a page of each layer and end beyond it, and short ones that never fill one."""
    rng = random.Random(17)
    sizes = [(0, 512 - 3 * i, 12 + 3 * i) for i in range(5)] + [(1, 9 + i, 60) for i in range(10)]
    return [
        Request(number, models[m].name, tuple(rng.randrange(models[m].spec.vocab_size) for _ in range(prompt)), new)
        for number, (m, prompt, new) in enumerate(sizes)
    ]


@pytest.mark.parametrize("system_name", OPTIONS_OF)
def test_preemption_and_recomputation_change_no_token(system_name, wide_checkpoints):
    models = served(wide_checkpoints, (LONG, SHORT))
    system = registry.create(system_name, {**OPTIONS, "prefill_chunk": 128, **OPTIONS_OF[system_name]})
    placement = system.plan(cuda_cluster(1, MEMORY_BYTES), models, Demand())
    requests = growing_requests(models)
    try:
        system.start(with_kv_pages(placement, SCARCE_PAGES, PAGE_BYTES))
        tokens = generate(system, requests)
        samples = system.pool_samples()
        assert sum(device.preemptions for device in system.stats()) > 0
    finally:
        system.stop()
    assert not judges.worker_processes()
    used = [sample.pages_in_use.get(SHORT, 0) for sample in samples]
    if system_name == "quota":
        assert max(used) > 0.2 * SCARCE_PAGES, "quota moved to the model that had requests waiting"
    assert all(sum(sample.pages_in_use.values()) <= SCARCE_PAGES for sample in samples)
    for request in requests:
        found = tokens[request.request_id]
        assert len(found) == request.max_new_tokens
        assert judges.greedy_agrees(wide_checkpoints[request.model], request.prompt, tuple(found)), request.model
