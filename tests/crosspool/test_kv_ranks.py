"""Several KV devices: tokens do not change, requests spread over the ranks, and each rank's pages all come back."""

import random

import pytest
from served import served
from test_token_equality import MEMORY_BYTES, OPTIONS, assert_equal_to_judge, ragged_requests

from serving import registry
from serving.errors import UserError
from serving.generate import cpu_cluster, generate
from serving.interface import Demand
from serving.sim.backend import simulate_card

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize(("control", "sharding"), [("lowered", "layer"), ("host", "whole")])
def test_tokens_equal_the_judge_and_every_rank_serves(control, sharding, tiny_checkpoints):
    models = served(tiny_checkpoints, ["mixtral", "deepseek_v2"])
    options = {**OPTIONS, "kv_devices": 2, "control": control, "ffn_sharding": sharding}
    system = registry.create("crosspool", options)
    rng = random.Random(control)
    requests = ragged_requests(models[0], 6, rng) + ragged_requests(models[1], 6, rng, first_id=100)
    try:
        system.start(system.plan(cpu_cluster(4, MEMORY_BYTES), models, Demand()))
        assert_equal_to_judge(requests, generate(system, requests), tiny_checkpoints)
        samples = system.pool_samples()
        pools = {sample.device for sample in samples if sum(sample.pages_in_use.values())}
        assert pools == {"cpu:0/kv-pool-0", "cpu:1/kv-pool-1"}
        last = {sample.device: sample for sample in samples}
        assert all(sum(sample.pages_in_use.values()) == 0 for sample in last.values())
        crossed = {stats.device: stats.bytes_crossed for stats in system.stats()}
        assert min(crossed["cpu:0"], crossed["cpu:1"]) > 0
    finally:
        system.stop()


@pytest.mark.parametrize("ranks", [1, 2])
def test_simulated_ranks_all_work(ranks, tiny_checkpoints):
    models = served(tiny_checkpoints, ["mixtral"])
    system = registry.create("crosspool", {**OPTIONS, "kv_devices": ranks})
    requests = ragged_requests(models[0], 12, random.Random(1))
    backend = simulate_card("a100-40gb")
    try:
        system.start(system.plan(cpu_cluster(4, MEMORY_BYTES), models, Demand()), backend)
        for request in requests:
            system.submit(request)
        backend.clock.sleep(1.0)
        assert sum(event.kind.terminal for event in system.poll()) == len(requests)
        assert sum(stats.bytes_crossed > 0 for stats in system.stats()) == ranks
    finally:
        system.stop()


def test_the_weights_pool_needs_a_device_too(tiny_checkpoints):
    system = registry.create("crosspool", {"kv_devices": 2})
    with pytest.raises(UserError, match="needs 3 devices at least, 2 for KV"):
        system.plan(cpu_cluster(2, MEMORY_BYTES), served(tiny_checkpoints, ["mixtral"]), Demand())
    with pytest.raises(UserError, match="option kv_devices is 0"):
        registry.create("crosspool", {"kv_devices": 0})
