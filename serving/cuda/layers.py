"""The two halves of a model on a card: plain weights in its memory, the operators' CUDA forms, fit for graph capture.

They compute what :mod:`serving.layers` computes on the CPU. What differs is kept here: weights stay as stored (rotary
channels too), positions and lengths come from the card's memory, and nothing asks the host.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch.nn.functional import linear

from kernels.attention import decode_gqa, prefill_gqa
from kernels.dense_ffn import dense_ffn
from kernels.mla import decode_mla, prefill_mla
from kernels.moe_ffn import ExpertWeights, moe_ffn
from kernels.resident_ffn import FFNLayer
from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.rope import RopeTable, rope_write_gqa, rope_write_mla
from kernels.router import route
from serving.checkpoints.weights import Weights
from serving.cuda.layout import CardLayout
from serving.layers.rope import attention_temperature, inverse_frequencies
from serving.layers.sizes import weight_bytes_attention, weight_bytes_ffn
from serving.spec import MLASpec, ModelSpec, yarn_softmax_factor

_LATENT_NORM_EPS = 1e-6  # fixed in the published code, whatever the model's own


def rope_table(spec: ModelSpec, device: torch.device) -> RopeTable:
    """Cosines and sines of every position that the model knows."""
    positions = torch.arange(spec.max_context_tokens, dtype=torch.float32)
    angles = torch.outer(positions, inverse_frequencies(spec.rope))
    temperature = attention_temperature(spec.rope)
    return RopeTable((angles.cos() * temperature).to(device), (angles.sin() * temperature).to(device))


Keep = Callable[[int, torch.Tensor], torch.Tensor]
"""Gives a tensor on the card its place as part of a unit (see :mod:`serving.residency.image`): the same values, there."""


class _Loader:
    """Copies stored tensors to a card in one dtype, each to its place in `unit` where `keep` gives one."""

    def __init__(self, dtype: torch.dtype, device: torch.device, keep: Keep | None = None) -> None:
        self.dtype, self.device, self._keep = dtype, device, keep
        self.unit = 0

    def __call__(self, *tensors: torch.Tensor) -> torch.Tensor:
        """The tensors joined along their first dimension; a copy, so that nothing of the checkpoint is held."""
        parts = [tensor.to(self.device, self.dtype) for tensor in tensors]
        if self._keep is not None:
            return self._keep(self.unit, torch.cat(parts))
        return torch.cat(parts) if len(parts) > 1 else parts[0].clone()

    def kept(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor`, which is on the card already, at its place."""
        return tensor if self._keep is None else self._keep(self.unit, tensor)


def _attend_by_kind(
    layout: CardLayout, decode: Callable[[slice], torch.Tensor], prefill: Callable[[slice], torch.Tensor]
) -> torch.Tensor:
    """Attention of all rows of a part, those that decode by the one kernel and those of a chunk by the other."""
    shape = layout.shape
    first = shape.decode
    if not shape.chunk:
        return decode(slice(0, first))
    if not first:
        return prefill(slice(0, shape.chunk))
    return torch.cat([decode(slice(0, first)), prefill(slice(first, shape.rows))])


class GQALayer:
    """Multi-head or grouped-query attention with Q, K and V in one product."""

    def __init__(self, spec: ModelSpec, tensors: dict[str, torch.Tensor], load: _Loader) -> None:
        self._attention, self._eps, self._interleaved = spec.attention, spec.norm_eps, spec.rope.interleaved
        self._qkv = load(tensors["q"], tensors["k"], tensors["v"])
        self._o = load(tensors["o"])
        self._qk_norm = (load(tensors["q_norm"]), load(tensors["k_norm"])) if spec.attention.qk_norm else None

    def forward(self, x: torch.Tensor, cache: torch.Tensor, layout: CardLayout, table: RopeTable) -> torch.Tensor:
        """Attention of `x` [T, D]; K and V of the rows are written to `cache` [slots, 2, KH, d] first. Result [T, D]."""
        attention = self._attention
        heads, kv_heads, dim = attention.num_heads, attention.num_kv_heads, attention.head_dim
        qkv = linear(x, self._qkv).view(x.shape[0], -1, dim)  # [T, H + 2 KH, d]
        queries, keys, values = qkv.split((heads, kv_heads, kv_heads), dim=1)
        if self._qk_norm is not None:
            flat = qkv.view(-1, dim)  # norming the others too costs less than packing these
            queries, keys = (rms_norm(flat, weight, self._eps).view(qkv.shape) for weight in self._qk_norm)
            queries, keys = queries[:, :heads], keys[:, heads : heads + kv_heads]
        queries = rope_write_gqa(
            queries, keys, values, table.cos, table.sin, layout.positions, cache, layout.slots, self._interleaved
        )
        scale = attention.softmax_scale
        out = _attend_by_kind(
            layout,
            lambda rows: decode_gqa(queries[rows], layout.decode_kv(cache), scale),
            lambda rows: prefill_gqa(queries[rows], layout.chunk_kv(cache), (layout.shape.chunk,), scale),
        )
        return linear(out.view(x.shape[0], -1), self._o)


class MLALayer:
    """Multi-head latent attention in absorbed form (see :mod:`serving.layers.mla`)."""

    def __init__(self, spec: ModelSpec, tensors: dict[str, torch.Tensor], load: _Loader) -> None:
        attention = spec.attention
        self._attention, self._interleaved = attention, spec.rope.interleaved
        self._scale = attention.softmax_scale * yarn_softmax_factor(spec.rope)
        self._down = load(tensors["q" if attention.q_rank is None else "q_a"], tensors["kv_a"])
        if attention.q_rank is not None:
            self._q_a_norm, self._q_b = load(tensors["q_a_norm"]), load(tensors["q_b"])
        self._kv_norm = load(tensors["kv_a_norm"])
        expand = tensors["kv_b"].to(load.device, load.dtype).view(attention.num_heads, -1, attention.kv_rank)
        self._w_uk = load.kept(expand[:, : attention.nope_dim].contiguous())  # [H, nope, rank]
        self._w_uv = load.kept(expand[:, attention.nope_dim :].transpose(1, 2).contiguous())  # [H, rank, value]
        self._o = load(tensors["o"])

    def forward(self, x: torch.Tensor, cache: torch.Tensor, layout: CardLayout, table: RopeTable) -> torch.Tensor:
        """Attention of `x` [T, D]; latents of the rows are written to `cache` [slots, rank + rope] first. Result [T, D]."""
        attention, rows = self._attention, x.shape[0]
        rank, nope = attention.kv_rank, attention.nope_dim
        down = linear(x, self._down)
        query, latent, key = down.split((down.shape[1] - rank - attention.rope_dim, rank, attention.rope_dim), dim=1)
        if attention.q_rank is not None:
            query = linear(rms_norm(query, self._q_a_norm, _LATENT_NORM_EPS), self._q_b)
        query = query.reshape(rows, attention.num_heads, attention.qk_dim)
        latent = rms_norm(latent, self._kv_norm, _LATENT_NORM_EPS)
        turned = rope_write_mla(
            query[:, :, nope:], latent, key, table.cos, table.sin, layout.positions, cache, layout.slots,
            self._interleaved,
        )  # fmt: skip
        absorbed = torch.bmm(query[:, :, :nope].transpose(0, 1), self._w_uk).transpose(0, 1)  # [T, H, rank]
        chunk, scale = (layout.shape.chunk,), self._scale
        attended = _attend_by_kind(
            layout,
            lambda rows: decode_mla(absorbed[rows], turned[rows], layout.decode_kv(cache), scale),
            lambda rows: prefill_mla(absorbed[rows], turned[rows], layout.chunk_kv(cache), chunk, scale),
        )
        out = torch.bmm(attended.transpose(0, 1), self._w_uv).transpose(0, 1)  # [T, H, value]
        return linear(out.reshape(rows, -1), self._o)


class CardAttentionHalf:
    """The attention half of `spec` on a card; see :class:`serving.layers.attention_half.AttentionHalf`."""

    def __init__(
        self, spec: ModelSpec, weights: Weights, dtype: torch.dtype, device: torch.device, keep: Keep | None = None
    ) -> None:
        self.spec, self.dtype, self.device = spec, dtype, device
        self.weight_bytes = weight_bytes_attention(spec, str(dtype).removeprefix("torch."))
        load = _Loader(dtype, device, keep)
        layer_class = MLALayer if isinstance(spec.attention, MLASpec) else GQALayer
        self._table = rope_table(spec, device)
        self._layers, self._norms = [], []
        self._embedding = load(weights.embedding())
        for load.unit in range(spec.num_layers):
            tensors = weights.attention(load.unit)
            self._norms.append((load(tensors["input_norm"]), load(tensors["post_norm"])))
            self._layers.append(layer_class(spec, tensors, load))
        load.unit = spec.num_layers
        self._final_norm = load(weights.final_norm())
        self._head = self._embedding if spec.tied_head else load(weights.head())

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Hidden rows [T, D] of `token_ids` [T]."""
        return self._embedding.index_select(0, token_ids)

    def attend(
        self, layer: int, hidden: torch.Tensor, ffn_out: torch.Tensor | None, cache: torch.Tensor, layout: CardLayout
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One layer: residual, norm, attention, residual, norm. Returns (hidden [T, D], rows for this layer's FFN)."""
        attended, hidden = self.attend_heads(layer, hidden, ffn_out, cache, layout)
        return self.after_attention(layer, attended, hidden)

    def attend_heads(
        self, layer: int, hidden: torch.Tensor, ffn_out: torch.Tensor | None, cache: torch.Tensor, layout: CardLayout
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The first part of `attend`: (attended [T, D], hidden [T, D]). Where heads are shared out over ranks, `attended` is to be
        summed over them before `after_attention`."""
        input_norm, eps = self._norms[layer][0], self.spec.norm_eps
        if ffn_out is None:
            normed = rms_norm(hidden, input_norm, eps)
        else:
            normed, hidden = add_rms_norm(hidden, ffn_out, input_norm, eps)
        return self._layers[layer].forward(normed, cache, layout, self._table), hidden

    def after_attention(
        self, layer: int, attended: torch.Tensor, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The second part: residual and norm. Returns (hidden [T, D], rows for this layer's FFN [T, D])."""
        ffn_in, hidden = add_rms_norm(attended, hidden, self._norms[layer][1], self.spec.norm_eps)
        return hidden, ffn_in

    def logits(self, hidden: torch.Tensor, ffn_out: torch.Tensor, layout: CardLayout) -> torch.Tensor:
        """Logits [rows wanted, V] float32 after the last layer's residual."""
        if layout.logit_rows is not None:
            hidden, ffn_out = (rows.index_select(0, layout.logit_rows) for rows in (hidden, ffn_out))
        normed, _ = add_rms_norm(hidden, ffn_out, self._final_norm, self.spec.norm_eps)
        return linear(normed, self._head).float()


class CardFFNHalf:
    """The FFN half of `spec` on a card, of some `layers` where given; see :class:`serving.layers.ffn_half.FFNHalf`."""

    def __init__(
        self,
        spec: ModelSpec,
        weights: Weights,
        dtype: torch.dtype,
        device: torch.device,
        layers: Collection[int] | None = None,
        keep: Keep | None = None,
    ) -> None:
        self.spec, self.dtype, self.device = spec, dtype, device
        self.weight_bytes = weight_bytes_ffn(spec, str(dtype).removeprefix("torch."), layers)
        self.layers = tuple(range(spec.num_layers)) if layers is None else tuple(sorted(layers))
        load = _Loader(dtype, device, keep)
        self._gates: dict[int, torch.Tensor] = {}  # float32, as published code chooses experts
        self._layers = {layer: self._load_layer(layer, weights, load) for layer in self.layers}

    def _load_layer(self, layer: int, weights: Weights, load: _Loader) -> FFNLayer:
        load.unit = layer
        if self.spec.is_dense(layer):
            gate, up, down = weights.dense(layer)
            return FFNLayer(shared_gate_up=load(gate, up), shared_down=load(down))
        moe, hidden = self.spec.moe, self.spec.hidden_size
        router = weights.router(layer)
        self._gates[layer] = load.kept(router["gate"].to(self.device, torch.float32, copy=True))
        experts = ExpertWeights(
            load.kept(torch.empty(moe.num_experts, 2 * moe.expert_width, hidden, dtype=self.dtype, device=self.device)),
            load.kept(torch.empty(moe.num_experts, hidden, moe.expert_width, dtype=self.dtype, device=self.device)),
        )
        for index in range(moe.num_experts):
            gate, up, down = weights.expert(layer, index)
            experts.gate_up[index, : moe.expert_width].copy_(gate)
            experts.gate_up[index, moe.expert_width :].copy_(up)
            experts.down[index].copy_(down)
        shared_gate_up = shared_down = None
        if moe.shared_width:
            gate, up, down = weights.shared(layer)
            shared_gate_up, shared_down = load(gate, up), load(down)
        return FFNLayer(
            router=load.kept(self._gates[layer].to(self.dtype)),
            experts=experts,
            shared_gate_up=shared_gate_up,
            shared_down=shared_down,
            bias=load.kept(router["bias"].to(self.device, torch.float32, copy=True)) if "bias" in router else None,
            top_k=moe.top_k,
            rule=moe.routing,
            routed_scale=moe.routed_scale,
            num_groups=moe.num_groups,
            top_groups=moe.top_groups,
        )

    @property
    def resident_layers(self) -> list[FFNLayer]:
        """The layers that it holds as the resident executor reads them, in order."""
        return [self._layers[layer] for layer in self.layers]

    def forward(self, layer: int, rows: torch.Tensor) -> torch.Tensor:
        """FFN of `rows` [T, D] in `layer`: [T, D]."""
        held = self._layers[layer]
        if held.experts is None:
            return dense_ffn(rows, held.shared_gate_up, held.shared_down)
        logits = linear(rows.float(), self._gates[layer])
        rule = (held.rule, held.bias, held.routed_scale, held.num_groups, held.top_groups)
        out = moe_ffn(rows, held.experts, *route(logits, held.top_k, *rule))
        return out if held.shared_down is None else out.add_(dense_ffn(rows, held.shared_gate_up, held.shared_down))
