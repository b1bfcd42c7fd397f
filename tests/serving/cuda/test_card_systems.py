"""Systems on a card against the judge: greedy tokens equal `transformers` in float32 on every architecture, two models at a
time, whichever way the pools find each other; memory by driver calls behind them."""

import random

import judges
import pytest
import torch

from serving import registry
from serving.generate import cuda_cluster, generate
from serving.interface import Demand, Request, ServedModel
from serving.spec import load_spec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch sees none"),
]

PAGE_BYTES = 2 << 20
MEMORY_BYTES = 4 << 30
CHUNK = 16
PAIRS = [("mixtral", "deepseek_v2"), ("deepseek", "qwen3_moe"), ("glm4_moe_lite", "mixtral")]
OPTIONS = {"max_batch": 4, "prefill_chunk": CHUNK, "page_bytes": PAGE_BYTES, "max_running": 16}
SYSTEMS = {
    "static": ("static", 1, {}),
    "elastic": ("elastic", 1, {}),
    "crosspool-lowered": ("crosspool", 2, {"control": "lowered"}),
    "crosspool-1-lane": ("crosspool", 2, {"control": "lowered", "lanes": 1}),
    "crosspool-host": ("crosspool", 2, {"control": "host"}),
    "swap": ("swap", 1, {"weights_share": 0.001, "hysteresis_s": 0.01}),  # room for the larger model alone
    "swap-token": ("swap", 1, {"weights_share": 0.001, "mode": "token", "tbt_target_s": 0.02}),
}


def requests_for(model, rng, first_id):
    lengths = [1, 2 * CHUNK + 5] + [rng.randint(2, 3 * CHUNK) for _ in range(3)]
    return [
        Request(
            first_id + i, model.name, tuple(rng.randrange(model.spec.vocab_size) for _ in range(n)), rng.randint(2, 9)
        )
        for i, n in enumerate(lengths)
    ]


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
@pytest.mark.parametrize("system_name", SYSTEMS)
def test_tokens_equal_the_judge(system_name, pair, tiny_checkpoints):
    name, devices, options = SYSTEMS[system_name]
    models = [ServedModel(load_spec(tiny_checkpoints[a], name=a), tiny_checkpoints[a], "float32") for a in pair]
    system = registry.create(name, {**OPTIONS, **options})
    rng = random.Random(f"{system_name}{pair}")
    requests = [r for i, model in enumerate(models) for r in requests_for(model, rng, 100 * i)]
    rng.shuffle(requests)
    try:
        system.start(system.plan(cuda_cluster(devices, MEMORY_BYTES), models, Demand()))
        tokens = generate(system, requests)
        last = system.pool_samples()[-1]
        assert sum(last.pages_in_use.values()) == 0
    finally:
        system.stop()
    assert not judges.worker_processes()
    for request in requests:
        expected = judges.greedy_reference(tiny_checkpoints[request.model], request.prompt, request.max_new_tokens)
        assert tokens[request.request_id] == expected, f"{request.model}, prompt of {len(request.prompt)} tokens"
