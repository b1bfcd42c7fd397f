"""The attention half of a model: embeddings, norms, attention over the KV cache, LM head. It lives beside the KV.

A layer is one call, `attend`: it takes the rows that came back from the FFN of the layer before and returns the rows for
the FFN of this one. Weights are packed once at load; each stored tensor is read once and dropped.
"""

from __future__ import annotations

import functools

import torch

from kernels.linear import linear, pack
from kernels.rms_norm import add_rms_norm, rms_norm
from serving.checkpoints.weights import Weights
from serving.layers.batch import BatchLayout
from serving.layers.gqa import GQALayer
from serving.layers.keep import Keep, as_made
from serving.layers.mla import MLALayer
from serving.layers.rope import RotaryTable
from serving.layers.sizes import weight_bytes_attention
from serving.spec import MLASpec, ModelSpec


class AttentionHalf:
    """Attention side of `spec` in `dtype`. `weight_bytes` is what it holds; `keep` says where."""

    def __init__(self, spec: ModelSpec, weights: Weights, dtype: torch.dtype, keep: Keep = as_made) -> None:
        self.spec, self.dtype = spec, dtype
        self.weight_bytes = weight_bytes_attention(spec, str(dtype).removeprefix("torch."))
        self._rotary = RotaryTable(spec.rope, spec.max_context_tokens)
        layer_class = MLALayer if isinstance(spec.attention, MLASpec) else GQALayer
        self._layers = []
        self._norms: list[tuple[torch.Tensor, torch.Tensor]] = []
        for index in range(spec.num_layers):
            tensors, own = weights.attention(index), functools.partial(keep, index)
            norms = (tensors[name].to(dtype, copy=True) for name in ("input_norm", "post_norm"))
            self._norms.append(tuple(map(own, norms)))
            self._layers.append(layer_class(spec, tensors, dtype, own))
        self._final_norm = keep(spec.num_layers, weights.final_norm().to(dtype, copy=True))
        self._embedding = keep(0, weights.embedding().to(dtype, copy=True))  # [V, D]
        self._head = keep(spec.num_layers, pack(weights.head().to(dtype)))  # [V, D]

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Hidden rows [T, D] of `token_ids` [T] int64."""
        return self._embedding.index_select(0, token_ids)

    def attend(
        self,
        layer: int,
        hidden: torch.Tensor,
        ffn_out: torch.Tensor | None,
        cache: torch.Tensor,
        layout: BatchLayout,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One layer: residual of the FFN before (`ffn_out` [T, D], None for layer 0), norm, attention with its KV written
        into `cache` (this layer's slots), residual, norm. Returns (hidden [T, D], rows for this layer's FFN [T, D])."""
        attended, hidden = self.attend_heads(layer, hidden, ffn_out, cache, layout)
        return self.after_attention(layer, attended, hidden)

    def attend_heads(
        self,
        layer: int,
        hidden: torch.Tensor,
        ffn_out: torch.Tensor | None,
        cache: torch.Tensor,
        layout: BatchLayout,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The first part of `attend`, up to what this half's heads give: (attended [T, D], hidden [T, D]). Where heads are
        shared out over ranks, `attended` is to be summed over them before `after_attention`."""
        if layout.turns is None:
            layout.turns = self._rotary.rows(layout.positions, max(layout.kv_lens) - 1)
        input_norm, eps = self._norms[layer][0], self.spec.norm_eps
        if ffn_out is None:
            normed = rms_norm(hidden, input_norm, eps)
        else:
            normed, hidden = add_rms_norm(hidden, ffn_out, input_norm, eps)
        return self._layers[layer].forward(normed, cache, layout), hidden

    def after_attention(
        self, layer: int, attended: torch.Tensor, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The second part: residual and norm. Returns (hidden [T, D], rows for this layer's FFN [T, D])."""
        ffn_in, hidden = add_rms_norm(attended, hidden, self._norms[layer][1], self.spec.norm_eps)
        return hidden, ffn_in

    def logits(self, hidden: torch.Tensor, ffn_out: torch.Tensor, layout: BatchLayout) -> torch.Tensor:
        """Logits [len(logit_rows), V] float32 after the last layer's residual."""
        if len(layout.logit_rows) < layout.rows:
            rows = torch.tensor(layout.logit_rows)
            hidden, ffn_out = hidden.index_select(0, rows), ffn_out.index_select(0, rows)
        normed, _ = add_rms_norm(hidden, ffn_out, self._final_norm, self.spec.norm_eps)
        return linear(normed, self._head).float()
