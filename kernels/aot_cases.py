"""The calls that :mod:`kernels.aot` compiles: every operator on meta tensors, with the shapes of the models served.

Meta tensors stand for an H200: what is done on Hopper alone (MLA's prefill) is compiled for the other cards too, and spills there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from kernels.paged_kv import PagedKV

META = torch.device("meta")
BLOCK_TOKENS = 64
CONTEXT_TOKENS = 8192


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def _kv(batch: int, entry: tuple[int, ...], dtype: torch.dtype) -> PagedKV:
    blocks = CONTEXT_TOKENS // BLOCK_TOKENS
    table = _empty(batch, blocks, dtype=torch.int32)
    lens = _empty(batch, dtype=torch.int32)
    return PagedKV(_empty(batch * CONTEXT_TOKENS, *entry, dtype=dtype), BLOCK_TOKENS, table, lens)


def _rms_norm(width: int) -> None:
    from kernels.rms_norm.triton import add_rms_norm, rms_norm

    rms_norm(_empty(8, width), _empty(width), 1e-6)
    add_rms_norm(_empty(8, width), _empty(8, width), _empty(width), 1e-6)


def _rope_gqa() -> None:
    from kernels.rope.triton import rope_write_gqa

    q, k, v = _empty(8, 48, 128).split([32, 8, 8], dim=1)
    table = _empty(4096, 64, dtype=torch.float32)
    positions = _empty(8, dtype=torch.int64)
    rope_write_gqa(q, k, v, table, table, positions, _empty(1024, 2, 8, 128), positions)


def _rope_mla() -> None:
    from kernels.rope.triton import rope_write_mla

    table = _empty(4096, 32, dtype=torch.float32)
    positions = _empty(8, dtype=torch.int64)
    query = _empty(8, 16, 192)[..., 128:]
    rope_write_mla(
        query, _empty(8, 512), _empty(8, 576)[:, 512:], table, table, positions, _empty(1024, 576), positions, True
    )


def _decode_gqa(heads: int, kv_heads: int, dim: int, dtype: torch.dtype = torch.bfloat16, batch: int = 8) -> None:
    from kernels.attention.triton import decode_gqa

    decode_gqa(_empty(batch, heads, dim, dtype=dtype), _kv(batch, (2, kv_heads, dim), dtype), dim**-0.5)


def _prefill_gqa(tokens: int, kv_heads: int = 8, dtype: torch.dtype = torch.bfloat16) -> None:
    from kernels.attention.triton import prefill_gqa

    prefill_gqa(_empty(tokens, 32, 128, dtype=dtype), _kv(1, (2, kv_heads, 128), dtype), (tokens,), 128**-0.5)


def _decode_mla(heads: int, dtype: torch.dtype = torch.bfloat16) -> None:
    from kernels.mla.triton import decode_mla

    kv = _kv(8, (576,), dtype)
    decode_mla(_empty(8, heads, 512, dtype=dtype), _empty(8, heads, 64, dtype=dtype), kv, 192**-0.5)


def _prefill_mla(tokens: int, heads: int, dtype: torch.dtype = torch.bfloat16) -> None:
    from kernels.mla.triton import prefill_mla

    q = _empty(tokens, heads, 512, dtype=dtype)
    prefill_mla(q, _empty(tokens, heads, 64, dtype=dtype), _kv(1, (576,), dtype), (tokens,), 192**-0.5)


def _router(num_experts: int, top_k: int, rule: str, num_groups: int = 1, top_groups: int = 1) -> None:
    from kernels.router.triton import route, sort_by_expert

    bias = _empty(num_experts, dtype=torch.float32) if rule == "sigmoid_bias" else None
    _, experts = route(_empty(8, num_experts, dtype=torch.float32), top_k, rule, bias, 2.5, num_groups, top_groups)
    sort_by_expert(experts, num_experts)


def _moe(rows: int, depth: int, width: int, num_experts: int, top_k: int, dtype: torch.dtype = torch.bfloat16) -> None:
    from kernels.moe_ffn import ExpertWeights
    from kernels.moe_ffn.triton import moe_ffn

    weights = ExpertWeights(
        _empty(num_experts, 2 * width, depth, dtype=dtype), _empty(num_experts, depth, width, dtype=dtype)
    )
    routing = _empty(rows, top_k, dtype=torch.float32), _empty(rows, top_k, dtype=torch.int64)
    moe_ffn(_empty(rows, depth, dtype=dtype), weights, *routing)


def _moe_by_descriptor(*shape: int) -> None:
    """Without a card nothing is tuned, and only tuned sizes read through descriptors."""
    from kernels import tuning

    tuning.set_override("moe_ffn", {"TMA": 1, "DOWN_TMA": 1, "num_stages": 4})
    try:
        _moe(*shape)
    finally:
        tuning.set_override("moe_ffn", None)


def _dense(rows: int, depth: int, width: int) -> None:
    from kernels.dense_ffn.triton import dense_ffn

    dense_ffn(_empty(rows, depth), _empty(2 * width, depth), _empty(depth, width))


def _lm_head() -> None:
    from kernels.lm_head.triton import greedy

    greedy(_empty(8, 151936, dtype=torch.float32))


def _exchange() -> None:
    from kernels.exchange import symmetric
    from kernels.exchange.triton import collect, exchange, post

    outbox, inbox = symmetric([META] * 4, 4 * 2048, torch.bfloat16)[0]
    exchange(outbox, inbox, _empty(16, 2048), True, 1, 1000)
    post(outbox, _empty(4, 2048))
    collect(inbox, 4, 2048, False, 1000)


def _mailbox() -> None:
    from kernels.mailbox import Mailbox
    from kernels.mailbox.triton import put, wait

    mailbox = Mailbox.allocate(2, 64, 2048, torch.bfloat16, META)
    put(mailbox, 1, _empty(8, 2048))
    wait(mailbox, 1, 8, 2048, 1000)


def _resident(dtype: torch.dtype) -> None:
    from kernels.moe_ffn import ExpertWeights
    from kernels.resident_ffn import FFNLayer
    from kernels.resident_ffn.executor import ResidentFFN

    def layer(depth: int, width: int, num_experts: int, top_k: int) -> FFNLayer:
        gate_up = _empty(num_experts, 2 * width, depth, dtype=dtype)
        experts = ExpertWeights(gate_up, _empty(num_experts, depth, width, dtype=dtype))
        return FFNLayer(_empty(num_experts, depth, dtype=dtype), experts, top_k=top_k, rule="softmax_renorm")

    executor = ResidentFFN([[layer(*QWEN3)], [layer(*MIXTRAL)]], dtype, META, num_slots=4, max_rows=64)
    executor.launch_worker(132, 1000)
    executor.submit(0, 0, 1, _empty(8, 2048, dtype=dtype))
    executor.collect(1, 8, 2048)


QWEN3 = (2048, 768, 128, 8)
MIXTRAL = (4096, 14336, 8, 2)

CASES: dict[str, Callable[[], None]] = {
    "rms_norm_2048": functools.partial(_rms_norm, 2048),
    "rms_norm_128": functools.partial(_rms_norm, 128),
    "rope_gqa": _rope_gqa,
    "rope_mla": _rope_mla,
    "decode_gqa_32_8_128": functools.partial(_decode_gqa, 32, 8, 128),
    "decode_gqa_batch_1": functools.partial(_decode_gqa, 32, 8, 128, batch=1),
    "decode_gqa_16_16_128": functools.partial(_decode_gqa, 16, 16, 128),
    "decode_gqa_fp32": functools.partial(_decode_gqa, 32, 8, 128, torch.float32),
    "prefill_gqa_2048": functools.partial(_prefill_gqa, 2048),
    "prefill_gqa_256": functools.partial(_prefill_gqa, 256, 4),
    "prefill_gqa_16": functools.partial(_prefill_gqa, 16, 4),
    "prefill_gqa_mha_16": functools.partial(_prefill_gqa, 16, 32),
    "prefill_gqa_fp32": functools.partial(_prefill_gqa, 512, 8, torch.float32),
    "decode_mla_16": functools.partial(_decode_mla, 16),
    "decode_mla_20": functools.partial(_decode_mla, 20),
    "decode_mla_128": functools.partial(_decode_mla, 128),
    "decode_mla_fp32": functools.partial(_decode_mla, 16, torch.float32),
    "prefill_mla_4096": functools.partial(_prefill_mla, 4096, 16),
    "prefill_mla_256": functools.partial(_prefill_mla, 256, 20),
    "prefill_mla_16": functools.partial(_prefill_mla, 16, 16),
    "prefill_mla_fp32": functools.partial(_prefill_mla, 512, 16, torch.float32),
    "router_mixtral": functools.partial(_router, 8, 2, "softmax_topk_renorm"),
    "router_qwen3": functools.partial(_router, 128, 8, "softmax_renorm"),
    "router_deepseek_v3": functools.partial(_router, 256, 8, "sigmoid_bias", 8, 4),
    "decode_ffn_qwen3_1": functools.partial(_moe, 1, *QWEN3),
    "decode_ffn_qwen3_16": functools.partial(_moe, 16, *QWEN3),
    "decode_ffn_qwen3_64": functools.partial(_moe, 64, *QWEN3),
    "decode_ffn_mixtral_8": functools.partial(_moe, 8, *MIXTRAL),
    "decode_ffn_fp32": functools.partial(_moe, 8, *QWEN3, torch.float32),
    "decode_ffn_fp32_sorted": functools.partial(_moe, 64, *QWEN3, torch.float32),
    "ffn_qwen3_512": functools.partial(_moe, 512, *QWEN3),
    "ffn_qwen3_1024": functools.partial(_moe, 1024, *QWEN3),
    "ffn_qwen3_4096": functools.partial(_moe, 4096, *QWEN3),
    "ffn_qwen3_4096_descriptors": functools.partial(_moe_by_descriptor, 4096, *QWEN3),
    "ffn_mixtral_4096": functools.partial(_moe, 4096, *MIXTRAL),
    "decode_dense_ffn": functools.partial(_dense, 4, 2048, 2816),
    "dense_ffn_2048": functools.partial(_dense, 2048, 2048, 10944),
    "lm_head": _lm_head,
    "mailbox": _mailbox,
    "exchange": _exchange,
    "resident_ffn": functools.partial(_resident, torch.bfloat16),
    "resident_ffn_fp32": functools.partial(_resident, torch.float32),
}
