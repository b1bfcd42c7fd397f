"""The FFN half of a model: routers, experts, shared experts and dense layers. It lives in the weights pool.

It never sees a sequence, a position or a KV cache: rows come in, rows go out.
"""

from __future__ import annotations

import functools
from collections.abc import Collection

import torch

from kernels.dense_ffn import dense_ffn
from kernels.linear import pack
from kernels.moe_ffn import PackedExperts, moe_ffn
from kernels.router import route
from serving.checkpoints.weights import Weights
from serving.layers.keep import Keep, KeepOne, as_made
from serving.layers.sizes import weight_bytes_ffn
from serving.spec import ModelSpec

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _pack_ffn(tensors: Tensors, dtype: torch.dtype, keep: KeepOne) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed (gate and up joined, down): two products an FFN."""
    gate, up, down = tensors
    return keep(pack(torch.cat([gate, up]).to(dtype))), keep(pack(down.to(dtype)))


class Dense:
    """A dense layer."""

    def __init__(self, tensors: Tensors, dtype: torch.dtype, keep: KeepOne) -> None:
        self._gate_up, self._down = _pack_ffn(tensors, dtype, keep)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """down(silu(gate x) * up x) of rows `x` [T, D]: [T, D]."""
        return dense_ffn(x, self._gate_up, self._down)


class Routed:
    """A routed layer: the router, its experts, and what all tokens share."""

    def __init__(self, spec: ModelSpec, weights: Weights, layer: int, dtype: torch.dtype, keep: KeepOne) -> None:
        self._moe = spec.moe
        router = weights.router(layer)
        self._gate = keep(
            router["gate"].float().contiguous().clone()
        )  # [E, D]: chosen in float32, as published code does
        self._bias = keep(router["bias"].float().clone()) if "bias" in router else None
        experts = [_pack_ffn(weights.expert(layer, index), dtype, keep) for index in range(spec.moe.num_experts)]
        self._experts = PackedExperts.of(*zip(*experts, strict=True))
        self._shared = Dense(weights.shared(layer), dtype, keep) if spec.moe.shared_width else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The weighted sum of each row's chosen experts, and the shared ones, of rows `x` [T, D]: [T, D]."""
        moe = self._moe
        logits = torch.nn.functional.linear(x.float(), self._gate)  # [T, E]
        routed = route(logits, moe.top_k, moe.routing, self._bias, moe.routed_scale, moe.num_groups, moe.top_groups)
        out = moe_ffn(x, self._experts, *routed)
        return out if self._shared is None else out.add_(self._shared.forward(x))


class FFNHalf:
    """FFN side of `spec` in `dtype`, of some `layers` where given. `weight_bytes` is what it holds. Given a share's spec
    and weights it holds a slice of each FFN's width, and what it computes is that share's partial sum. `keep` says where its
    tensors lie."""

    def __init__(
        self,
        spec: ModelSpec,
        weights: Weights,
        dtype: torch.dtype,
        layers: Collection[int] | None = None,
        keep: Keep = as_made,
    ) -> None:
        self.spec, self.dtype = spec, dtype
        self.weight_bytes = weight_bytes_ffn(spec, str(dtype).removeprefix("torch."), layers)
        self._layers = {
            layer: self._make(weights, layer, functools.partial(keep, layer))
            for layer in (range(spec.num_layers) if layers is None else layers)
        }

    def _make(self, weights: Weights, layer: int, keep: KeepOne) -> Dense | Routed:
        if self.spec.is_dense(layer):
            return Dense(weights.dense(layer), self.dtype, keep)
        return Routed(self.spec, weights, layer, self.dtype, keep)

    def forward(self, layer: int, rows: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """FFN of `rows` [T, D] in `layer`, into `out` [T, D] where given."""
        result = self._layers[layer].forward(rows)
        return result if out is None else out.copy_(result)
