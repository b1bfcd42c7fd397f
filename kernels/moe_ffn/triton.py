"""The routed FFN on CUDA: gate, up and SiLU in one kernel, down in the next; which kernels, and in what blocks."""

from __future__ import annotations

import torch

from kernels import tuning
from kernels.launch import ceil_div, next_power_of_2, num_sms
from kernels.moe_ffn.blocks import ALL_TILES, OF_DOWN, SMALL_ROWS
from kernels.moe_ffn.few_rows import ffn_few_rows
from kernels.moe_ffn.many_rows import ffn_many_rows
from kernels.moe_ffn.weights import ExpertWeights


def moe_ffn(
    x: torch.Tensor, weights: ExpertWeights, topk_weights: torch.Tensor, topk_experts: torch.Tensor
) -> torch.Tensor:
    """See :func:`kernels.moe_ffn.moe_ffn`."""
    return _ffn(x, weights.gate_up, weights.down, topk_weights.contiguous(), topk_experts.contiguous())


def dense(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """The same kernels for one FFN [2W, D], [D, W] that every row goes through."""
    return _ffn(x, gate_up.unsqueeze(0), down.unsqueeze(0), None, None)


def _ffn(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    topk_weights: torch.Tensor | None,
    topk_experts: torch.Tensor | None,
) -> torch.Tensor:
    rows, depth = x.shape
    num_experts, width = gate_up.shape[0], down.shape[2]
    small = rows <= SMALL_ROWS
    top_k = 1 if topk_experts is None else topk_experts.shape[1]
    default = _small_blocks(x, rows * top_k, width) if small else _large_blocks(x, rows * top_k / num_experts)
    key = f"d{depth}_w{width}_e{num_experts}_k{top_k}_t{next_power_of_2(rows)}"
    chosen = tuning.config("moe_ffn", key, x, default)
    run = ffn_few_rows if small else ffn_many_rows
    return run(x, gate_up, down, topk_weights, topk_experts, chosen)


def _small_blocks(x: torch.Tensor, choices: int, width: int) -> dict[str, int]:
    """Narrow slices while there are few programs, so that each multiprocessor has several reads in flight."""
    narrow = choices * ceil_div(width, 32) < 3 * num_sms(x.device)
    return {
        "BLOCK_N": 16 if narrow else 32,
        "DOWN_N": 16 if narrow else 32,
        "BLOCK_K": 64 if x.element_size() == 4 else 128,
        "num_warps": 4,
        "num_stages": 4,
    }


def _large_blocks(x: torch.Tensor, rows_per_expert: float) -> dict[str, int]:
    if x.element_size() == 4:
        rows, channels, down_channels, depth, warps, stages = 16, 32, 32, 32, 4, 2
    elif rows_per_expert <= 16:
        rows, channels, down_channels, depth, warps, stages = 16, 64, 64, 128, 4, 3
    elif rows_per_expert <= 48:
        rows, channels, down_channels, depth, warps, stages = 32, 64, 64, 128, 4, 3
    elif rows_per_expert <= 96:
        rows, channels, down_channels, depth, warps, stages = 64, 64, 128, 64, 4, 3
    else:
        rows, channels, down_channels, depth, warps, stages = 128, 128, 128, 64, 8, 3
    blocks = {"BLOCK_M": rows, "BLOCK_N": channels, "BLOCK_K": depth, "GROUP": ALL_TILES, "TMA": 0}
    blocks |= {"num_warps": warps, "num_stages": stages}
    return blocks | {of_down: blocks[name] for name, of_down in OF_DOWN.items()} | {"DOWN_N": down_channels}
