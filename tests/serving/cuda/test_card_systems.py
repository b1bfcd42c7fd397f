"""Systems on a card against the judge: greedy tokens equal `transformers` in float32 on every architecture, two models at a
time, whichever way the pools find each other; memory by driver calls behind them."""

import pytest
import torch
from served import OPTIONS, check_tokens

from serving import registry
from serving.generate import cuda_cluster

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch sees none"),
]

MEMORY_BYTES = 4 << 30
PAIRS = [("mixtral", "deepseek_v2"), ("deepseek", "qwen3_moe"), ("glm4_moe_lite", "mixtral")]
SYSTEMS = {
    "static": ("static", 1, {}),
    "elastic": ("elastic", 1, {}),
    "elastic-placement": ("elastic-placement", 1, {}),
    "quota": ("quota", 1, {}),
    "crosspool-lowered": ("crosspool", 2, {"control": "lowered"}),
    "crosspool-1-lane": ("crosspool", 2, {"control": "lowered", "lanes": 1}),
    "crosspool-host": ("crosspool", 2, {"control": "host"}),
    "swap": ("swap", 1, {"weights_share": 0.001, "hysteresis_s": 0.01}),  # room for the larger model alone
    "swap-token": ("swap", 1, {"weights_share": 0.001, "mode": "token", "tbt_target_s": 0.02}),
}


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
@pytest.mark.parametrize("system_name", SYSTEMS)
def test_tokens_equal_the_judge(system_name, pair, tiny_checkpoints):
    name, devices, options = SYSTEMS[system_name]
    system = registry.create(name, {**OPTIONS, **options})
    cluster = cuda_cluster(devices, MEMORY_BYTES)
    check_tokens(system, cluster, pair, tiny_checkpoints, f"{system_name}{pair}")
