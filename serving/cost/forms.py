"""Roofline forms: seconds of one operator from its sizes, a card's datasheet and a handful of fitted coefficients.

Every form is `t0 + soft_max(bytes / (eta_b bandwidth), flops / (eta_f peak), serial)`: a fixed cost, and the slowest of
memory, arithmetic and the longest chain of dependent work inside one thread block, blended by a q-norm because they
overlap imperfectly. Efficiencies are fractions of the datasheet, so a fit moves to another card by exchanging the
:class:`~serving.cost.hardware.Hardware`. Coefficients ending in `_us` are times; those ending in `_ns` are times on a multiprocessor with a stated
share of the memory bandwidth, and scale with that share. All forms take NumPy arrays or
plain numbers and return seconds.
"""

from __future__ import annotations

import numpy as np

from serving.cost.form import (
    NS,
    TILE,
    US,
    Coefficients,
    Columns,
    Form,
    Kernel,
    peak,
    serial_scale,
    soft_max,
    waves,
)
from serving.cost.hardware import Hardware
from serving.cost.stage_forms import STAGE_FORMS


def _tail(blocks, slots, weight: float):
    """By how much the last, partly filled wave stretches the run; `weight` is the share that is really lost."""
    rounds = np.maximum(blocks / slots, 1e-9)
    return 1.0 + weight * (np.ceil(rounds) / rounds - 1.0)


def _cached_bytes(moved, p: Coefficients, x: Columns, hw: Hardware):
    """Bytes that count at memory speed. Benchmarks re-read the same KV: what fits the last-level cache costs less.

    Serving does not (all layers' weights pass between two visits), so `cold` columns switch the discount off.
    """
    if x.get("cold", False):
        return moved
    held = 1.0 / (1.0 + (moved / (p["cache_share"] * hw.cache_bytes)) ** 8)
    return moved * (1.0 - held * (1.0 - p["cache_cost"]))


def gemm(p: Coefficients, x: Columns, hw: Hardware, kernel: Kernel):
    """[m, k] x [k, n]. Serial: one tile's walk along k, cut short where the library splits k."""
    m, n, k = x["m"], x["n"], x["k"]
    moved = kernel.cast_bytes * (m * k + n * k + m * n)
    memory = moved / (p["eta_b"] * hw.memory_bandwidth)
    serial = p["k_ns"] * NS * serial_scale(hw) * k / (1.0 + k / (1000.0 * p["k_split"]))
    tiles = np.ceil(m / TILE) * np.ceil(n / TILE)
    compute = 2.0 * m * n * k / (p["eta_f"] * peak(hw, kernel)) * _tail(tiles, hw.num_sms, p["tail"])
    return p["t0_us"] * US + soft_max(p["q"], memory, serial, compute)


def moe(p: Coefficients, x: Columns, hw: Hardware, kernel: Kernel):
    """Both products of a routed FFN: `distinct` experts' weights once, arithmetic padded by `pad_rows` an expert."""
    tokens, hidden, width, hit = x["num_tokens"], x["hidden_size"], x["width"], x["distinct"]
    pairs = tokens * x["topk"]
    moved = kernel.cast_bytes * (
        3.0 * hit * hidden * width + 2.0 * tokens * hidden + pairs * (3.0 * width + 2.0 * hidden)
    )
    memory = moved / (p["eta_b"] * hw.memory_bandwidth)
    serial = p["k_ns"] * NS * serial_scale(hw) * (hidden + width)
    compute = 6.0 * hidden * width * (pairs + p["pad_rows"] * hit) / (p["eta_f"] * peak(hw, kernel))
    compute = compute * (1.0 + p["half_width"] / width)  # short inner loops of the second product
    routing = p["route_ns"] * NS * pairs + p["expert_us"] * US * hit
    return p["t0_us"] * US + routing + soft_max(p["q"], memory, serial, compute)


def _kv_splits(kernel: Kernel, groups, slots, context):
    """Parts each sequence's KV is cut into so that the thread blocks fill the card, and the tokens of one part."""
    blocks = np.ceil(context / kernel.kv_block)
    if kernel.fixed_splits:
        splits = np.minimum(kernel.fixed_splits, context)
    else:
        splits = np.clip(np.floor(slots / groups), 1, np.minimum(blocks, kernel.max_splits))
        splits = np.where(blocks <= kernel.min_blocks, 1, splits)
    part = np.ceil(blocks / splits) * kernel.kv_block
    return splits, (part if kernel.padded_kv else np.minimum(part, context))


def _decode_core(p: Coefficients, x: Columns, hw: Hardware, kernel: Kernel, groups, token_scale, moved, io, flops):
    """What decode attention of both kinds shares: splits, waves, memory, arithmetic, and the merge of the parts."""
    context = x["context"]
    splits, part = _kv_splits(kernel, groups, hw.num_sms, context)
    # Seen in FlashAttention's measured kernels, cause unknown: a part of over four KV blocks costs a constant more.
    longer = np.where(part > 4 * kernel.kv_block, p["long_us"], 0.0)
    block = (p["block_us"] + longer) * US + p["token_ns"] * NS * serial_scale(hw) * part * token_scale
    rounds = waves(groups * splits, hw.num_sms, kernel.whole_waves)
    serial = block * np.maximum(1.0, rounds * p["share"])
    memory = (_cached_bytes(moved, p, x, hw) + io) / (p["eta_b"] * hw.memory_bandwidth)
    compute = flops / (p["eta_f"] * peak(hw, kernel))
    merge = np.where(splits > 1, p["merge_us"] + p["merge_part_us"] * splits, 0.0) * US
    ramp = p["ramp_ns"] * NS * np.minimum(context, 512)
    return p["t0_us"] * US + merge + ramp + soft_max(p["q"], serial, memory, compute)


def decode_attention(p: Coefficients, x: Columns, hw: Hardware, kernel: Kernel):
    """One query a sequence against `context` tokens of paged KV: MHA, GQA, MQA."""
    batch, heads, kv_heads, dim = x["batch_size"], x["num_heads"], x["num_key_value_heads"], x["head_dim"]
    head_groups = np.ceil(heads / kv_heads / kernel.group_heads)
    moved = 2.0 * kernel.cast_bytes * batch * x["context"] * kv_heads * dim
    io = 2.0 * kernel.cast_bytes * batch * heads * dim
    flops = 4.0 * batch * x["context"] * kv_heads * head_groups * kernel.group_heads * dim
    core = _decode_core(
        p, x, hw, kernel, batch * kv_heads * head_groups * kernel.blocks_per_group, dim / TILE, moved, io, flops
    )
    # Queries of one KV head are brought together by a copy, which is free for one sequence or one KV head.
    return core + np.where((batch > 1) & (kv_heads > 1), p["regroup_us"] * US, 0.0)


LATENT, LATENT_ROPE = 512, 64  # widths of all measured MLA rows; columns `kv_rank` and `rope_dim` override them
EXPANDED_QK, EXPANDED_V = 192, 128  # likewise per head at prefill: columns `qk_dim` and `v_dim`


def decode_mla(p: Coefficients, x: Columns, hw: Hardware, kernel: Kernel):
    """One absorbed query a sequence against the latent of `context` tokens."""
    batch, heads = x["batch_size"], x["num_heads"]
    rank, rope = x.get("kv_rank", LATENT), x.get("rope_dim", LATENT_ROPE)
    groups = batch * np.ceil(heads / kernel.group_heads) * kernel.blocks_per_group
    moved = kernel.cast_bytes * batch * x["context"] * (rank + rope)
    io = kernel.cast_bytes * batch * heads * (2 * rank + rope)
    flops = 2.0 * batch * x["context"] * np.maximum(heads, kernel.latent_heads) * (2 * rank + rope)
    device = _decode_core(p, x, hw, kernel, groups, 1.0, moved, io, flops)
    if kernel.host_floor and not x.get("graph", False):
        return np.maximum(device, p["host_us"] * US)
    return device


def _prefill_core(p: Coefficients, x: Columns, hw: Hardware, kernel: Kernel, dim_in, dim_out, kv_width):
    """A causal prompt of `isl` tokens for each of `batch_size` sequences."""
    batch, tokens, heads = x["batch_size"], x["isl"], x["num_heads"]
    tiles = batch * heads * np.ceil(tokens / TILE)
    pairs = batch * heads * tokens * (tokens + TILE) / 2.0
    flops = 2.0 * pairs * (dim_in + dim_out)
    compute = flops / (p["eta_f"] * peak(hw, kernel)) * _tail(tiles, hw.num_sms, p["tail"])
    moved = kernel.cast_bytes * batch * tokens * (heads * (dim_in + dim_out) + kv_width)
    memory = moved / (p["eta_b"] * hw.memory_bandwidth)
    serial = p["block_us"] * US + p["token_ns"] * NS * serial_scale(hw) * tokens
    device = p["t0_us"] * US + soft_max(p["q"], memory, compute, serial)
    if kernel.host_floor and not x.get("graph", False):
        return np.maximum(device, p["host_us"] * US)
    return device


def prefill_attention(p: Coefficients, x: Columns, hw: Hardware, kernel: Kernel):
    """MHA, GQA and MQA over a fresh prompt."""
    dim = x["head_dim"]
    return _prefill_core(p, x, hw, kernel, dim, dim, 2.0 * x["num_key_value_heads"] * dim)


def prefill_mla(p: Coefficients, x: Columns, hw: Hardware, kernel: Kernel):
    """MLA over a fresh prompt, keys and values expanded."""
    latent = x.get("kv_rank", LATENT) + x.get("rope_dim", LATENT_ROPE)
    return _prefill_core(p, x, hw, kernel, x.get("qk_dim", EXPANDED_QK), x.get("v_dim", EXPANDED_V), latent)


def collective(p: Coefficients, x: Columns, hw: Hardware, kernel: Kernel):
    """All-reduce and its kin of `message_size` bytes over `num_gpus` cards: hops of latency, and the ring's wire bytes."""
    gpus, size = x["num_gpus"], x["message_size"]
    wire = 2.0 * size * (gpus - 1) / gpus / (p["eta_b"] * hw.peer_bandwidth)
    device = p["t0_us"] * US + p["hop_us"] * US * (gpus - 1) + soft_max(p["q"], wire, p["step_us"] * US * np.log2(gpus))
    if kernel.host_floor and not x.get("graph", False):
        return np.maximum(device, p["host_us"] * US)
    return device


def elementwise(p: Coefficients, x: Columns, hw: Hardware, kernel: Kernel):
    """What is neither product nor attention: `rows` rows of `width` elements, `passes` reads and writes of them in all."""
    moved = kernel.cast_bytes * x["rows"] * x["width"] * x.get("passes", 2.0)
    return p["t0_us"] * US + moved / (p["eta_b"] * hw.memory_bandwidth)


ELEMENTWISE = ("embed", "norm", "rope", "route", "activation", "sample")
EFFICIENCY = (0.02, 1.0)
COMMON_BOUNDS = {"eta_b": EFFICIENCY, "eta_f": EFFICIENCY, "q": (1.0, 8.0), "tail": (0.01, 1.0), "share": (0.1, 2.0)}
CACHE_BOUNDS = {"cache_share": (0.3, 1.5), "cache_cost": (0.1, 1.0)}
DECODE_START = {
    "t0_us": 6.0, "eta_b": 0.85, "eta_f": 0.5, "q": 2.0, "block_us": 2.0, "token_ns": 4.0, "long_us": 1.0, "share": 1.0,
    "merge_us": 3.0, "merge_part_us": 0.01, "ramp_ns": 1.0, "cache_share": 1.0, "cache_cost": 0.5,
}  # fmt: skip
PREFILL_START = {
    "t0_us": 8.0, "eta_b": 0.7, "eta_f": 0.6, "q": 2.0, "tail": 0.5, "block_us": 1.0, "token_ns": 2.0, "host_us": 300.0,
}  # fmt: skip

FORMS = {
    form.operator: form
    for form in (
        Form(
            "gemm", gemm, ("n", "k"), ("m",),
            {"t0_us": 2.3, "eta_b": 0.85, "eta_f": 0.6, "q": 1.5, "tail": 0.5, "k_ns": 1.5, "k_split": 4.0},
            COMMON_BOUNDS,
        ),
        Form(
            "moe", moe, ("hidden_size", "width", "topk", "num_experts"), ("num_tokens",),
            {"t0_us": 12.0, "eta_b": 0.85, "eta_f": 0.5, "q": 2.0, "k_ns": 2.0, "pad_rows": 8.0, "half_width": 50.0,
                "expert_us": 0.01,
             "route_ns": 0.1},
            COMMON_BOUNDS | {"half_width": (1.0, 150.0), "route_ns": (1e-4, 0.5)},
        ),
        Form(
            "decode_attention", decode_attention, ("num_heads", "num_key_value_heads", "head_dim", "window_size"),
            ("batch_size", "context"), {**DECODE_START, "regroup_us": 0.5}, COMMON_BOUNDS | CACHE_BOUNDS,
        ),
        Form(
            "decode_mla", decode_mla, ("num_heads",), ("batch_size", "context"), {**DECODE_START, "host_us": 300.0},
            COMMON_BOUNDS | CACHE_BOUNDS,
        ),
        Form(
            "prefill_attention", prefill_attention, ("num_heads", "num_key_value_heads", "head_dim"),
            ("batch_size", "isl"), PREFILL_START, COMMON_BOUNDS,
        ),
        Form("prefill_mla", prefill_mla, ("num_heads",), ("batch_size", "isl"), PREFILL_START, COMMON_BOUNDS),
        Form(
            "collective", collective, ("num_gpus",), ("message_size",),
            {"t0_us": 4.0, "hop_us": 0.1, "eta_b": 0.6, "q": 2.0, "step_us": 1.0, "host_us": 20.0}, COMMON_BOUNDS,
            split=("num_gpus", "message_size"),
        ),
        *(
            Form(name, elementwise, ("width",), ("rows",), {"t0_us": 2.4, "eta_b": 0.8}, {"eta_b": (1e-3, 1.0)})
            for name in ELEMENTWISE
        ),
    )
} | STAGE_FORMS  # fmt: skip
