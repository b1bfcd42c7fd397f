"""The FFN half of a model: routers, experts, shared experts and dense layers. It lives in the weights pool.

It never sees a sequence, a position or a KV cache: rows come in, rows go out.
"""

from __future__ import annotations

from collections.abc import Collection

import torch

from kernels.dense_ffn import dense_ffn
from kernels.linear import pack
from kernels.moe_ffn import PackedExperts, moe_ffn
from kernels.router import route
from serving.checkpoints.weights import Weights
from serving.layers.sizes import weight_bytes_ffn
from serving.spec import ModelSpec

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _pack_ffn(tensors: Tensors, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed (gate and up joined, down): two products an FFN."""
    gate, up, down = tensors
    return pack(torch.cat([gate, up]).to(dtype)), pack(down.to(dtype))


class Dense:
    """A dense layer."""

    def __init__(self, tensors: Tensors, dtype: torch.dtype) -> None:
        self._gate_up, self._down = _pack_ffn(tensors, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """down(silu(gate x) * up x) of rows `x` [T, D]: [T, D]."""
        return dense_ffn(x, self._gate_up, self._down)


class Routed:
    """A routed layer: the router, its experts, and what all tokens share."""

    def __init__(self, spec: ModelSpec, weights: Weights, layer: int, dtype: torch.dtype) -> None:
        self._moe = spec.moe
        router = weights.router(layer)
        self._gate = router["gate"].float().contiguous().clone()  # [E, D]: chosen in float32, as published code does
        self._bias = router["bias"].float().clone() if "bias" in router else None
        experts = [_pack_ffn(weights.expert(layer, index), dtype) for index in range(spec.moe.num_experts)]
        self._experts = PackedExperts.of(*zip(*experts, strict=True))
        self._shared = Dense(weights.shared(layer), dtype) if spec.moe.shared_width else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The weighted sum of each row's chosen experts, and the shared ones, of rows `x` [T, D]: [T, D]."""
        moe = self._moe
        logits = torch.nn.functional.linear(x.float(), self._gate)  # [T, E]
        routed = route(logits, moe.top_k, moe.routing, self._bias, moe.routed_scale, moe.num_groups, moe.top_groups)
        out = moe_ffn(x, self._experts, *routed)
        return out if self._shared is None else out.add_(self._shared.forward(x))


class FFNHalf:
    """FFN side of `spec` in `dtype`, of some `layers` where given. `weight_bytes` is what it holds. Given a share's spec
    and weights it holds a slice of each FFN's width, and what it computes is that share's partial sum."""

    def __init__(
        self, spec: ModelSpec, weights: Weights, dtype: torch.dtype, layers: Collection[int] | None = None
    ) -> None:
        self.spec, self.dtype = spec, dtype
        self.weight_bytes = weight_bytes_ffn(spec, str(dtype).removeprefix("torch."), layers)
        self._layers = {
            layer: Dense(weights.dense(layer), dtype) if spec.is_dense(layer) else Routed(spec, weights, layer, dtype)
            for layer in (range(spec.num_layers) if layers is None else layers)
        }

    def forward(self, layer: int, rows: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """FFN of `rows` [T, D] in `layer`, into `out` [T, D] where given."""
        result = self._layers[layer].forward(rows)
        return result if out is None else out.copy_(result)
