"""How many kernels a layer of our engine is made of, by what differs between models."""

import pytest

from serving.cost.engine_kernels import attention_kernels, ffn_kernels, step_kernels
from serving.cost.table1 import published_spec

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize(
    ("model", "attention", "few", "many"),
    [
        ("mixtral-8x7b", 7, 5, 8),
        ("deepseek-moe-16b", 7, 8, 12),  # shared experts, and their sum with the others
        ("qwen3-30b-a3b", 9, 5, 8),  # norms of queries and keys
        ("deepseek-v2-lite", 12, 8, 12),  # latent attention
        ("glm-4.7-flash", 14, 8, 12),  # its query is projected down too
    ],
)
def test_kernels_of_a_layer(model, attention, few, many):
    spec = published_spec(model)
    last = spec.num_layers - 1
    assert attention_kernels(spec) == attention_kernels(spec, decode=False, chunk=True) == attention
    assert attention_kernels(spec, chunk=True) == attention + 3
    assert (ffn_kernels(spec, last, 1), ffn_kernels(spec, last, 16)) == (few, few)
    assert ffn_kernels(spec, last, 17) == many


def test_a_dense_layer_has_no_choice_to_make():
    spec = published_spec("deepseek-v2-lite")
    assert spec.is_dense(0) and (ffn_kernels(spec, 0, 4), ffn_kernels(spec, 0, 256)) == (2, 3)


def test_a_step_is_the_sum_of_its_parts():
    """Decode rows go with the first chunk, each other chunk by itself."""
    spec = published_spec("glm-4.7-flash")
    lone = step_kernels(spec, 0, [256])
    assert step_kernels(spec, 3, [64, 256]) == step_kernels(spec, 3, [64]) + lone
    assert step_kernels(spec, 3, []) < step_kernels(spec, 3, [64]) < step_kernels(spec, 3, []) + lone
    assert step_kernels(spec, 1, []) == 47 * 14 + 46 * 8 + 2
