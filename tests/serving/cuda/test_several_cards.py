"""Systems over several cards against the judge, all five architectures at once: CrossPool with its pools on cards of their own,
FFNs whole, dealt out by layer and cut by width, by every control; baselines whose engines have cards of their own or several; and what crosses."""

import pytest
import torch
from served import OPTIONS, check_tokens

from kernels.bench.crossing import crossing_seconds
from kernels.bench.exchanging import question_seconds, sum_seconds
from serving import registry
from serving.checkpoints.make import make_checkpoint
from serving.cuda.build import open_peer_access
from serving.generate import cuda_cluster
from serving.spec import ARCHITECTURES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

MEMORY_BYTES = 6 << 30
SYSTEMS = {
    "lowered": ("crosspool", 2, {"control": "lowered"}),
    "layers-lowered": ("crosspool", 3, {"control": "lowered", "ffn_sharding": "layer", "lanes": 3}),
    "layers-host": ("crosspool", 3, {"control": "host", "ffn_sharding": "layer"}),
    "cut-lowered": ("crosspool", 3, {"control": "lowered", "ffn_sharding": "tensor", "lanes": 3}),
    "cut-host": ("crosspool", 3, {"control": "host", "ffn_sharding": "tensor"}),
    "host": ("crosspool", 2, {"control": "host", "lanes": 1}),
    "static": ("static", 2, {}),
    "elastic": ("elastic", 2, {}),
    "elastic-placement": ("elastic-placement", 2, {}),
    "quota": ("quota", 2, {}),
    "swap": ("swap", 2, {"weights_share": 0.001, "hysteresis_s": 0.01}),
}


def groups(**devices: list[int]) -> dict:
    return {name: {"devices": numbers} for name, numbers in devices.items()}


ON_TWO = groups(**{name: [0, 1] for name in ARCHITECTURES})
OVERLAPPING = groups(mixtral=[0, 1], qwen3_moe=[0, 1, 2, 3], glm4_moe_lite=[1, 2], deepseek_v2=[3], deepseek=[2, 3])
GROUPED = {
    "static": ("static", 2, {"placement": "given", "groups": ON_TWO}),
    "elastic": ("elastic", 2, {"groups": ON_TWO}),
    "static-of-four": ("static", 4, {"placement": "given", "groups": OVERLAPPING}),
    "elastic-of-four": ("elastic", 4, {"groups": OVERLAPPING}),
}


@pytest.mark.parametrize("cards", [2, 4])
@pytest.mark.parametrize("rows", [1, 300])
def test_rows_are_added_up_over_cards_that_run_at_once(rows, cards):
    """Fifty sums over all, and fifty questions of one card to the others, with no host between them."""
    if torch.cuda.device_count() < cards:
        pytest.skip(f"needs {cards} CUDA devices")
    devices = [torch.device("cuda", index) for index in range(cards)]
    open_peer_access(devices)
    assert sum_seconds(rows, 2048, devices, torch.bfloat16) < 1e-3
    assert question_seconds(rows, 2048, devices[0], devices[1:], torch.bfloat16) < 1e-3


@pytest.mark.parametrize("rows", [1, 16, 500])
def test_rows_cross_between_cards(rows):
    """Fifty times there and back between kernels of two cards that run at once."""
    here, there = (torch.device("cuda", index) for index in range(2))
    open_peer_access({here, there})
    assert crossing_seconds(rows, 2048, here, torch.bfloat16, there) < 1e-3


@pytest.fixture(scope="module")
def wide_checkpoints(tmp_path_factory):
    """Two architectures of sizes that the resident executor reads."""
    root = tmp_path_factory.mktemp("wide")
    return {
        name: make_checkpoint(name, "100m", root / name, seed=1, progress=False) for name in ("mixtral", "deepseek_v2")
    }


@pytest.mark.parametrize("devices", [2, 3], ids=["apart", "layers"])
def test_tokens_of_the_resident_executor_equal_the_judge(devices, wide_checkpoints):
    """Two lanes, so that it always finds the next task before all of its programs have left the last one."""
    options = {"control": "resident", "ffn_sharding": "layer"}
    system = registry.create("crosspool", {**OPTIONS, **options})
    cluster = cuda_cluster(devices, MEMORY_BYTES)
    check_tokens(system, cluster, tuple(wide_checkpoints), wide_checkpoints, f"resident{devices}")


@pytest.mark.parametrize("system_name", SYSTEMS)
def test_tokens_equal_the_judge(system_name, tiny_checkpoints):
    name, devices, options = SYSTEMS[system_name]
    system = registry.create(name, {**OPTIONS, **options})
    check_tokens(system, cuda_cluster(devices, MEMORY_BYTES), ARCHITECTURES, tiny_checkpoints, system_name)


@pytest.mark.parametrize("system_name", GROUPED)
def test_tokens_of_models_over_several_cards_equal_the_judge(system_name, tiny_checkpoints):
    """Tensor-parallel and data-parallel attention; static groups that share cards in one process, elastic ones in one each."""
    name, devices, options = GROUPED[system_name]
    if torch.cuda.device_count() < devices:
        pytest.skip(f"needs {devices} CUDA devices")
    system = registry.create(name, {**OPTIONS, **options})
    check_tokens(system, cuda_cluster(devices, MEMORY_BYTES), ARCHITECTURES, tiny_checkpoints, f"groups-{system_name}")
