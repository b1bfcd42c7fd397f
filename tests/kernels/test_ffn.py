"""The routed and the dense FFN against their references: one token, shared and empty experts, odd widths, many rows."""

from __future__ import annotations

import pytest
import torch

from kernels.dense_ffn import reference as dense_reference
from kernels.moe_ffn import ExpertWeights
from kernels.moe_ffn import reference as moe_reference

pytestmark = pytest.mark.cpu


def layer(num_experts: int, depth: int, width: int, dtype, device) -> ExpertWeights:
    gate_up = torch.randn(num_experts, 2 * width, depth, device=device) * depth**-0.5
    down = torch.randn(num_experts, depth, width, device=device) * width**-0.5
    return ExpertWeights(gate_up.to(dtype), down.to(dtype))


def choices(rows: int, num_experts: int, top_k: int, used: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Distinct experts for each row, all below `used`."""
    experts = torch.stack([torch.randperm(used)[:top_k] for _ in range(rows)])
    return torch.rand(rows, top_k, device=device), experts.to(device)


@pytest.mark.parametrize(
    ("rows", "num_experts", "top_k", "used", "depth", "width"),
    [
        (1, 4, 2, 4, 64, 32),
        (3, 8, 2, 3, 72, 40),
        (16, 5, 3, 5, 48, 24),
        (17, 5, 1, 2, 40, 24),
        (50, 6, 3, 5, 40, 24),
        (130, 2, 2, 2, 32, 16),
    ],
    ids=["one_token", "experts_shared_by_rows", "full_tile", "empty_experts", "sorted", "tiles_of_one_expert"],
)
def test_moe_ffn(rows, num_experts, top_k, used, depth, width, dtype, device, check):
    from kernels.moe_ffn import triton as form

    weights = layer(num_experts, depth, width, dtype, device)
    x = torch.randn(rows, depth + 8, dtype=dtype, device=device)[:, :depth]
    routing = choices(rows, num_experts, top_k, used, device)
    check("out", form.moe_ffn(x, weights, *routing), moe_reference.moe_ffn(x, weights, *routing))


@pytest.fixture
def use_blocks():
    """`use_blocks(config)`: the routed FFN's block sizes until the test ends."""
    from kernels import tuning

    small = {"BLOCK_N": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
    small |= {"DOWN_N": 16, "DOWN_K": 16, "down_warps": 4, "down_stages": 2}
    yield lambda config: tuning.set_override("moe_ffn", {**small, **config})
    tuning.set_override("moe_ffn", None)


@pytest.mark.parametrize(
    "chosen",
    [
        {"BLOCK_M": 32, "TMA": 1, "DOWN_TMA": 0},
        {"BLOCK_M": 32, "TMA": 0, "DOWN_TMA": 1},
        {"BLOCK_M": 16, "TMA": 1, "DOWN_TMA": 1, "GROUP": 3, "DOWN_GROUP": 2},
        {"BLOCK_M": 128, "TMA": 1, "DOWN_TMA": 1},
    ],
    ids=["only_gate_up", "only_down", "in_groups", "half_tiles"],
)
def test_descriptors(chosen, dtype, device, check, use_blocks):
    """Weights, and rows of down, through descriptors: 46, 53, 44, 17 and no rows an expert."""
    from kernels.moe_ffn import triton as form

    weights = layer(5, 72, 40, dtype, device)
    x = torch.randn(160, 80, dtype=dtype, device=device)[:, :72]
    experts = torch.repeat_interleave(torch.arange(4), torch.tensor([46, 53, 44, 17])).view(160, 1)[torch.randperm(160)]
    routing = torch.rand(160, 1, device=device), experts.to(device)
    use_blocks(chosen)
    check("out", form.moe_ffn(x, weights, *routing), moe_reference.moe_ffn(x, weights, *routing))


def test_rows_that_no_descriptor_fits(device, check, use_blocks):
    """Rows of 22 bytes cannot be described: they are read by pointer, whatever was chosen."""
    from kernels.moe_ffn import triton as form

    weights = layer(3, 11, 13, torch.bfloat16, device)
    x = torch.randn(40, 11, dtype=torch.bfloat16, device=device)
    routing = choices(40, 3, 2, 3, device)
    use_blocks({"BLOCK_M": 32, "TMA": 1, "DOWN_TMA": 1})
    check("out", form.moe_ffn(x, weights, *routing), moe_reference.moe_ffn(x, weights, *routing))


@pytest.mark.parametrize("rows", [1, 3, 16, 37, 257])
def test_dense_ffn(rows, dtype, device, check):
    from kernels.dense_ffn import triton as form

    gate_up, down = (tensor[0] for tensor in layer(1, 72, 40, dtype, device))
    x = torch.randn(rows, 72, dtype=dtype, device=device)
    check("out", form.dense_ffn(x, gate_up, down), dense_reference.dense_ffn(x, gate_up, down))
