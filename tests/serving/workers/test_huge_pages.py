"""Weights of every system on CPU devices lie in huge pages, so that none reads them faster than another."""

import ctypes
from pathlib import Path

import judges
import pytest

from serving import registry
from serving.capacity import attention_bytes, ffn_bytes
from serving.generate import cpu_cluster
from serving.interface import Demand, ServedModel
from serving.memory.virtual import FRAME_BYTES, VirtualRange
from serving.spec import spec_from_config

pytestmark = pytest.mark.cpu

CONFIG = {
    "model_type": "mixtral",
    "hidden_size": 136,
    "intermediate_size": 264,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 70,
    "vocab_size": 8200,
    "torch_dtype": "float32",
}


def huge_bytes(pid="self") -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("AnonHugePages:"))


@pytest.fixture
def huge_pages():
    """Skips where a range that asks for huge pages gets none."""
    memory, before = VirtualRange(8 * FRAME_BYTES, align_bytes=FRAME_BYTES), huge_bytes()
    try:
        memory.open()
        ctypes.memset(memory.address, 1, 8 * FRAME_BYTES)
        if huge_bytes() - before < 8 * FRAME_BYTES:
            pytest.skip("this kernel gives no huge pages to who asks for them, or has none free")
    finally:
        memory.close()


@pytest.mark.parametrize("name", ["static", "elastic", "quota", "swap", "crosspool"])
def test_workers_have_their_weights_in_huge_pages(name, huge_pages, tmp_path):
    model = ServedModel(spec_from_config(CONFIG, "dummy"), tmp_path, "float32", dummy=True)
    halves = [attention_bytes(model), ffn_bytes(model)]
    assert min(halves) > 2 * FRAME_BYTES
    system = registry.create(name, {"page_bytes": 4096, "max_batch": 2})
    try:
        system.start(system.plan(cpu_cluster(2, 128 << 20), [model], Demand()))
        found = sum(huge_bytes(worker.pid) for worker in judges.worker_processes())
        assert found >= sum(half // FRAME_BYTES * FRAME_BYTES for half in halves)
    finally:
        system.stop()
