"""How many kernels a layer of our engine launches on a card, one after the other: counted in serving/cuda/layers.py and kernels/.

What steps in flight cost each other on a card goes by kernels (serving/cost/contention.py), and a step's time alone does not say
how many it is made of: latent attention has twice as many as attention with one head a query.
"""

from __future__ import annotations

from collections.abc import Sequence

from kernels.moe_ffn.blocks import SMALL_ROWS
from serving.spec import MLASpec, ModelSpec

_GQA = 7  # norm, Q K V, rotary with the write, attention, its combination, output, norm
_QK_NORMS = 2
_MLA = 12  # norm, down, latent norm, rotary with the write, absorb, copy, attention, its combination, expand, copy, output, norm
_QUERY_RANK = 2  # norm and product of a query that was projected down
_CHUNK_BESIDE_DECODE = 3  # a chunk's attention and combination beside those of decode rows, and both in one
_ROUTED_FEW, _ROUTED_MANY = 5, 8  # cast, gate, choice, gate and up, down; where rows are sorted also count, place, sum
_DENSE_FEW, _DENSE_MANY = 2, 3


def attention_kernels(spec: ModelSpec, decode: bool = True, chunk: bool = False) -> int:
    """Of one layer's attention half, of rows that decode, of a prompt's, or of both."""
    attention = spec.attention
    if isinstance(attention, MLASpec):
        count = _MLA + (_QUERY_RANK if attention.q_rank is not None else 0)
    else:
        count = _GQA + (_QK_NORMS if attention.qk_norm else 0)
    return count + (_CHUNK_BESIDE_DECODE if decode and chunk else 0)


def ffn_kernels(spec: ModelSpec, layer: int, rows: int) -> int:
    """Of one layer's FFN half for so many rows."""
    few = rows <= SMALL_ROWS
    dense = _DENSE_FEW if few else _DENSE_MANY
    if spec.is_dense(layer):
        return dense
    shared = dense + 1 if spec.moe.shared_width else 0  # and its sum with the routed ones
    return (_ROUTED_FEW if few else _ROUTED_MANY) + shared


def layer_kernels(spec: ModelSpec, layer: int, batch: int, chunk_rows: Sequence[int]) -> tuple[int, int]:
    """Of the attention and the FFN half of one layer in a step that decodes `batch` sequences and takes in a chunk of each of several
    prompts: decode rows go with the first chunk, each other chunk by itself (:mod:`serving.part_shapes`)."""
    parts = [(batch, sum(chunk_rows[:1])), *((0, rows) for rows in chunk_rows[1:])]
    attention = sum(attention_kernels(spec, decode > 0, chunk > 0) for decode, chunk in parts)
    return attention, sum(ffn_kernels(spec, layer, decode + chunk) for decode, chunk in parts)


def step_kernels(spec: ModelSpec, batch: int, chunk_rows: Sequence[int]) -> int:
    """Of all layers of such a step."""
    return sum(sum(layer_kernels(spec, layer, batch, chunk_rows)) for layer in range(spec.num_layers))
