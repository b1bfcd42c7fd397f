"""Specs and lengths in the planner's numbers: KV of a request is the same whichever way a pool of devices splits it."""

import pytest

from crosspool.planner.from_trace import ServiceModel
from crosspool.planner.models import model_bytes, model_demand, promised_output_tokens
from serving.errors import UserError
from serving.spec import spec_from_config

pytestmark = pytest.mark.cpu

CONFIG = {
    "model_type": "mixtral",
    "num_hidden_layers": 5,
    "hidden_size": 64,
    "vocab_size": 100,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
}
SPEC = spec_from_config(CONFIG, "mix")


def demand_on(devices, layers_per_run=1, outputs=(4, 5, 6, 7)):
    return model_demand(SPEC, "float32", 1.0, [9] * len(outputs), outputs, ServiceModel(), devices, layers_per_run)


@pytest.mark.parametrize(("devices", "runs"), [(1, 5), (2, 10), (4, 20), (8, 20), (3, 5)])
def test_tensor_parallel_ranks_split_the_heads_into_runs(devices, runs):
    demand = demand_on(devices)
    assert demand.num_runs == runs
    assert demand.token_bytes == SPEC.kv_bytes_per_token("float32")


def test_layers_that_share_runs_round_less_and_count_the_last_group_as_full():
    assert demand_on(1, 5).token_bytes == SPEC.kv_bytes_per_token("float32")
    assert demand_on(1, 100).num_runs == 1
    assert demand_on(1, 2).num_runs == 3
    assert demand_on(1, 5).pages(10, 65536) < demand_on(1, 1).pages(10, 65536)


def test_bytes_by_part_add_up_to_the_model():
    parts = model_bytes(SPEC, "float32")
    assert parts.attention_bytes + parts.ffn_bytes == 4 * SPEC.total_elements
    assert len(parts.ffn_layer_bytes) == 5


def test_promised_output_covers_the_share_asked_for():
    outputs = list(range(1, 101))
    promised = promised_output_tokens([demand_on(1, outputs=outputs)], 0.95)
    assert promised == {"mix": 95}
    with pytest.raises(UserError, match="outside"):
        promised_output_tokens([demand_on(1)], 1.0)
