"""Models cut over devices: tokens equal the judge's under tensor- and data-parallel attention, co-located and replicated;
nothing is left afterwards, and a rank that dies is named."""

import json
import os
import random
import signal
import time

import judges
import pytest
import test_token_equality as equality
import torch
from safetensors.torch import save_file

from serving import registry
from serving.checkpoints.dummy import seeded_tensor
from serving.checkpoints.names import all_shapes
from serving.checkpoints.sizes import config_of
from serving.errors import UserError, WorkerDied
from serving.generate import cpu_cluster, generate
from serving.interface import Demand, Request
from serving.spec import ARCHITECTURES, spec_from_config

pytestmark = pytest.mark.cpu

MEMORY_BYTES = 64 << 20
OPTIONS = {"max_batch": 8, "prefill_chunk": equality.CHUNK, "page_bytes": 4096, "placement": "given"}
EVEN_HEADS = {"deepseek": 4, "glm4_moe_lite": 6}  # the tiny models of these have an odd number, which cannot be halved


@pytest.fixture(scope="module")
def even_checkpoints(tiny_checkpoints, tmp_path_factory):
    """Tiny checkpoints whose heads can be halved."""
    made = dict(tiny_checkpoints)
    for architecture, heads in EVEN_HEADS.items():
        directory = made[architecture] = tmp_path_factory.mktemp(architecture)
        config = config_of(architecture, "tiny", "float32")
        config |= {"num_attention_heads": heads, "num_key_value_heads": heads}
        (directory / "config.json").write_text(json.dumps(config))
        spec = spec_from_config(config, architecture)
        tensors = {
            name: seeded_tensor(name, shape, spec.num_layers, 1, torch.float32)
            for name, shape in all_shapes(spec).items()
        }
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return made


def started(models, groups, devices=2):
    system = registry.create("static", {**OPTIONS, "groups": groups})
    system.start(system.plan(cpu_cluster(devices, MEMORY_BYTES), models, Demand()))
    return system


def check(system, models, checkpoints, counts):
    rng = random.Random(len(counts))
    for count in counts:
        requests = []
        for number, model in enumerate(models):
            requests += equality.ragged_requests(model, count, rng, first_id=100 * number)
        rng.shuffle(requests)
        equality.assert_equal_to_judge(requests, generate(system, requests), checkpoints)
    time.sleep(0.1)
    system.poll()
    last = {sample.device: sum(sample.pages_in_use.values()) for sample in system.pool_samples()}
    assert not any(last.values())


@pytest.mark.parametrize("cut", [{"tp": 2}, {"dp": 2}], ids=["tp2", "dp2"])
def test_every_architecture_cut_in_two_computes_the_same(cut, even_checkpoints):
    """All five at once, co-located on the same two devices."""
    descriptors = equality.open_descriptors()
    models = equality.served(even_checkpoints, ARCHITECTURES)
    system = started(models, {model.name: {"devices": [0, 1], **cut} for model in models})
    try:
        check(system, models, even_checkpoints, (1, 7))
        assert all(stats.bytes_crossed > 0 for stats in system.stats())
    finally:
        system.stop()
    assert not judges.worker_processes()
    assert equality.descriptors_left(descriptors) == []


def test_two_kv_heads_on_four_devices_are_tensor_and_data_parallel(tiny_checkpoints):
    """TP2 x DP2 (the paper's Fig. 2), and beside it a whole model and one with a replica on overlapping devices."""
    models = equality.served(tiny_checkpoints, ["mixtral", "qwen3_moe", "deepseek_v2"])
    groups = {
        "mixtral": {"devices": [0, 1, 2, 3]},
        "qwen3_moe": {"devices": ["cpu:3"]},
        "deepseek_v2": [{"devices": [1, 2]}, {"devices": [0]}],
    }
    system = started(models, groups, devices=4)
    try:
        check(system, models, tiny_checkpoints, (8,))
    finally:
        system.stop()


def test_a_rank_that_dies_is_named(tiny_checkpoints):
    models = equality.served(tiny_checkpoints, ["mixtral"])
    system = started(models, {"mixtral": {"devices": [0, 1]}})
    try:
        for number in range(6):
            system.submit(Request(number, "mixtral", (5, 6, 7) * 6, 400))
        time.sleep(0.1)
        os.kill(judges.worker_processes()[1].pid, signal.SIGKILL)
        deadline = time.monotonic() + 5
        with pytest.raises(WorkerDied, match=r"worker static/cpu:1 was killed by signal 9"):
            while time.monotonic() < deadline:
                system.poll()
                time.sleep(0.002)
    finally:
        system.stop()
    assert not judges.worker_processes()


WRONG = {
    "a model not placed": ({}, "must place the served models"),
    "an unknown device": ({"devices": ["gpu:7"]}, "is on 'gpu:7'; devices: 0 to 1"),
    "an unknown key": ({"devices": [0], "pp": 2}, "may have tp and dp"),
    "a group that does not fill": ({"devices": [0, 1], "tp": 1}, "does not fill the 2 devices"),
    "heads that cannot be cut": ({"devices": [0, 1], "tp": 2}, "5 attention heads cannot be cut into 2"),
    "replicas on one device": ([{"devices": [0]}, {"devices": [0]}], "share a device"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_placement_is_refused_in_one_line(case, tiny_checkpoints):
    stated, words = WRONG[case]
    models = equality.served(tiny_checkpoints, ["glm4_moe_lite"])
    groups = {"glm4_moe_lite": stated} if stated else {"other": {"devices": [0]}}
    system = registry.create("static", {**OPTIONS, "groups": groups})
    with pytest.raises(UserError, match=words):
        system.plan(cpu_cluster(2, MEMORY_BYTES), models, Demand())


def test_groups_without_the_placement_that_reads_them_are_refused():
    with pytest.raises(UserError, match="and only then"):
        registry.create("static", {"groups": {"a": {"devices": [0]}}})


def test_what_a_cut_saves_goes_to_kv(tiny_checkpoints):
    """Half of a model on each of two devices leaves more KV in all than the whole model on each."""
    (model,) = equality.served(tiny_checkpoints, ["mixtral"])
    cluster = cpu_cluster(2, MEMORY_BYTES)

    def kv_bytes(groups):
        system = registry.create("static", {**OPTIONS, "groups": {"mixtral": groups}})
        return sum(plan.kv_quota_bytes["mixtral"] for plan in system.plan(cluster, [model], Demand()).devices)

    assert kv_bytes({"devices": [0, 1]}) > kv_bytes([{"devices": [0]}, {"devices": [1]}])
