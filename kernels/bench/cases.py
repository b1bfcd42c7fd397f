"""What the bench checks and times: small odd sizes for correctness, the served models' shapes for speed, and targets."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from kernels.bench import problems
from kernels.bench.problems import Problem

Build = Callable[[torch.device, torch.dtype], Problem]


@dataclass(frozen=True)
class Target:
    """What an H200 should reach: a fraction of its datasheet's bandwidth, TFLOP/s, or at most so many microseconds."""

    bandwidth: float = 0.0
    tflops: float = 0.0
    microseconds: float = 0.0


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    op: str
    shape: str
    build: Build
    target: Target | None = None
    chunk: str = ""  # cases of one op with the same are one chunk of a prompt after several prefixes


def _case(
    op: str, shape: str, build: Callable[..., Problem], *sizes: object, target: Target | None = None, chunk: str = ""
) -> Case:
    return Case(op, shape, functools.partial(build, *sizes), target, chunk)


# (depth, expert width, experts, top-k) of one layer.
QWEN3 = (2048, 768, 128, 8)
MIXTRAL = (4096, 14336, 8, 2)
DEEPSEEK = (2048, 1408, 64, 6)
MIXTRAL_110M = (512, 1024, 8, 2)
MIXTRAL_600M = (1024, 2048, 8, 2)  # an expert is 25 MB in float32: no cache holds two


def _moe_cases(name: str, layer: tuple[int, ...], targets: dict[int, Target | None]) -> list[Case]:
    return [
        _case("moe_ffn", f"{name} T={rows}", problems.moe, rows, *layer, target=target)
        for rows, target in targets.items()
    ]


def _chunk_cases(op: str, model: str, build: Callable[..., Problem], *sizes: int) -> list[Case]:
    """Chunks of a prompt after tokens that are there."""
    return [
        _case(op, f"{model} {rows} after {before}", build, before + rows, rows, *sizes, chunk=f"{model} {rows}")
        for rows in (16, 64, 256)
        for before in (0, 2048, 8192, 32768)
    ]


CHECKS = [
    _case("rms_norm", "3x200", problems.norm, 3, 200),
    _case("rms_norm", "130x2048", problems.norm, 130, 2048),
    _case("rope", "5 tokens, 20/20 heads of 24", problems.rope_gqa, 5, 20, 20, 24),
    _case("rope", "33 tokens, 32/8 heads of 128", problems.rope_gqa, 33, 32, 8, 128),
    _case("rope", "MLA, 9 tokens, 20 heads", problems.rope_mla, 9, 20, 512, 64),
    _case("decode_gqa", "ragged, 32/8 of 128", problems.decode_gqa, [1, 64, 65, 700, 4099], 32, 8, 128),
    _case("decode_gqa", "ragged, 20/20 of 80", problems.decode_gqa, [3000, 2], 20, 20, 80),
    _case("prefill_gqa", "200 of 700, 32/8 of 128", problems.prefill_gqa, 700, 200, 32, 8, 128),
    _case("prefill_gqa", "9 of 9, 20/20 of 80", problems.prefill_gqa, 9, 9, 20, 20, 80),
    _case("prefill_gqa", "7 of 9000, 20/4 of 80", problems.prefill_gqa, 9000, 7, 20, 4, 80),
    _case("prefill_gqa", "130 of 4099, 32/4 of 128", problems.prefill_gqa, 4099, 130, 32, 4, 128),
    _case("decode_mla", "ragged, 16 heads", problems.decode_mla, [1, 64, 65, 700, 4099], 16, 512, 64),
    _case("decode_mla", "ragged, 20 heads", problems.decode_mla, [900, 2], 20, 512, 64),
    _case("prefill_mla", "70 of 300, 20 heads", problems.prefill_mla, 300, 70, 20, 512, 64),
    _case("prefill_mla", "7 of 9000, 16 heads", problems.prefill_mla, 9000, 7, 16, 512, 64),
    _case("prefill_mla", "130 of 4099, 20 heads", problems.prefill_mla, 4099, 130, 20, 512, 64),
    _case("router", "7 rows, 8 experts", problems.routing, 7, 8, 2, "softmax_topk_renorm", (1, 1)),
    _case("router", "600 rows, 160 experts in groups", problems.routing, 600, 160, 6, "softmax", (8, 3)),
    _case("router", "33 rows, 256 experts in groups", problems.routing, 33, 256, 8, "sigmoid_bias", (8, 4)),
    _case("moe_ffn", "T=1", problems.moe, 1, 256, 96, 8, 2),
    _case("moe_ffn", "T=16, odd width", problems.moe, 16, 272, 88, 16, 4),
    _case("moe_ffn", "T=17", problems.moe, 17, 256, 96, 60, 6),
    _case("moe_ffn", "T=150", problems.moe, 150, 256, 128, 8, 2),
    _case("moe_ffn", "T=700", problems.moe, 700, 256, 128, 8, 3),
    _case("dense_ffn", "T=1", problems.dense, 1, 256, 352),
    _case("dense_ffn", "T=16", problems.dense, 16, 256, 352),
    _case("dense_ffn", "T=300", problems.dense, 300, 256, 352),
    _case("lm_head", "3x4099", problems.greedy, 3, 4099),
]

CUDA_CASES = [
    _case("rms_norm", "1x2048", problems.norm, 1, 2048),
    _case("rms_norm", "8192x4096", problems.norm, 8192, 4096),
    _case("rope", "8 tokens, 32/8 of 128", problems.rope_gqa, 8, 32, 8, 128),
    _case("rope", "4096 tokens, 32/8 of 128", problems.rope_gqa, 4096, 32, 8, 128),
    _case("decode_gqa", "1 x 4K, 32/8", problems.decode_gqa, [4096], 32, 8, 128),
    _case("decode_gqa", "1 x 64K, 32/8", problems.decode_gqa, [65536], 32, 8, 128, target=Target(bandwidth=0.50)),
    _case("decode_gqa", "8 x 16K, 32/8", problems.decode_gqa, [16384] * 8, 32, 8, 128, target=Target(bandwidth=0.75)),
    _case("decode_gqa", "64 x 4K, 32/8", problems.decode_gqa, [4096] * 64, 32, 8, 128, target=Target(bandwidth=0.75)),
    _case("decode_gqa", "ragged 1K..32K, 32/4", problems.decode_gqa, [1024, 3000, 32768, 9000] * 4, 32, 4, 128),
    _case("decode_gqa", "8 x 16K, 16/16", problems.decode_gqa, [16384] * 8, 16, 16, 128, target=Target(bandwidth=0.75)),
    _case("prefill_gqa", "4096 of 4096, 32/8", problems.prefill_gqa, 4096, 4096, 32, 8, 128),
    _case("prefill_gqa", "512 of 16K, 32/8", problems.prefill_gqa, 16384, 512, 32, 8, 128),
    *_chunk_cases("prefill_gqa", "Qwen3", problems.prefill_gqa, 32, 4, 128),
    _case("decode_mla", "1 x 64K, 16 heads", problems.decode_mla, [65536], 16, 512, 64, target=Target(bandwidth=0.28)),
    _case("decode_mla", "32 x 8K, 16 heads", problems.decode_mla, [8192] * 32, 16, 512, 64, target=Target(0.60)),
    _case("decode_mla", "8 x 16K, 20 heads", problems.decode_mla, [16384] * 8, 20, 512, 64),
    _case("prefill_mla", "1024 of 4096, 16 heads", problems.prefill_mla, 4096, 1024, 16, 512, 64),
    *_chunk_cases("prefill_mla", "DeepSeek-V2-Lite", problems.prefill_mla, 16, 512, 64),
    *_chunk_cases("prefill_mla", "GLM-4.7-Flash", problems.prefill_mla, 20, 512, 64),
    _case("router", "T=1, 128 experts", problems.routing, 1, 128, 8, "softmax_renorm", (1, 1)),
    _case("router", "T=4096, 128 experts", problems.routing, 4096, 128, 8, "softmax_renorm", (1, 1)),
    *_moe_cases(
        "Qwen3",
        QWEN3,
        {
            1: Target(microseconds=40.0),
            4: None,
            8: Target(bandwidth=0.72),
            16: Target(bandwidth=0.80),
            64: Target(bandwidth=0.80),
            4096: Target(tflops=450.0),
        },
    ),
    *_moe_cases("DeepSeek-MoE", DEEPSEEK, {1: None, 16: None}),
    *_moe_cases(
        "Mixtral",
        MIXTRAL,
        {
            1: Target(bandwidth=0.75),
            8: Target(bandwidth=0.85),
            16: Target(bandwidth=0.85),
            64: Target(bandwidth=0.85),
            4096: Target(tflops=450.0),
        },
    ),
    _case("dense_ffn", "T=1, 2048x2816", problems.dense, 1, 2048, 2816),
    _case("dense_ffn", "T=8, 2048x10944", problems.dense, 8, 2048, 10944),
    _case("dense_ffn", "T=4096, 2048x10944", problems.dense, 4096, 2048, 10944, target=Target(tflops=450.0)),
    _case("lm_head", "1 x 152K", problems.greedy, 1, 151936),
    _case("lm_head", "64 x 152K", problems.greedy, 64, 151936),
]

CPU_CASES = [
    _case("rms_norm", "8x512", problems.norm, 8, 512),
    _case("rope", "8 tokens, 8/2 of 64", problems.rope_gqa, 8, 8, 2, 64),
    _case("decode_gqa", "1 x 4K, 8/2", problems.decode_gqa, [4096], 8, 2, 64),
    _case("decode_gqa", "8 x 1K, 8/2", problems.decode_gqa, [1024] * 8, 8, 2, 64),
    _case("prefill_gqa", "512 of 1K, 8/2", problems.prefill_gqa, 1024, 512, 8, 2, 64),
    _case("decode_mla", "8 x 1K, 8 heads", problems.decode_mla, [1024] * 8, 8, 128, 32),
    _case("prefill_mla", "128 of 512, 8 heads", problems.prefill_mla, 512, 128, 8, 128, 32),
    _case("router", "T=8, 8 experts", problems.routing, 8, 8, 2, "softmax_topk_renorm", (1, 1)),
    *_moe_cases("Mixtral-110M", MIXTRAL_110M, {1: None, 8: None, 128: None}),
    *_moe_cases("Mixtral-600M", MIXTRAL_600M, {1: None, 8: None}),
    _case("dense_ffn", "T=1, 512x1024", problems.dense, 1, 512, 1024),
    _case("lm_head", "8 x 4K", problems.greedy, 8, 4096),
]

OPS = tuple(dict.fromkeys(case.op for case in CHECKS))
