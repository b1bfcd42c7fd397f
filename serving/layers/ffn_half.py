"""The FFN half of a model: routers, experts, shared experts and dense layers. It lives in the weights pool.

It never sees a sequence, a position or a KV cache: rows come in, rows go out.
"""

from __future__ import annotations

import torch

from kernels.linear import linear, pack
from kernels.router.reference import route
from serving.checkpoints.weights import Weights
from serving.layers.sizes import weight_bytes_ffn
from serving.spec import ModelSpec

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Dense:
    """down(silu(gate x) * up x), gate and up in one packed product."""

    def __init__(self, tensors: Tensors, dtype: torch.dtype) -> None:
        gate, up, down = tensors
        self._width = gate.shape[0]
        self._gate_up = pack(torch.cat([gate, up]).to(dtype))
        self._down = pack(down.to(dtype))

    def forward(self, x: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
        """Rows `x` [T, D] through the FFN, each times `weight` [T, 1] where given. Result [T, D]."""
        gate_up = linear(x, self._gate_up)  # [T, 2W]
        activated = torch.nn.functional.silu(gate_up[:, : self._width]).mul_(gate_up[:, self._width :])
        if weight is not None:
            activated.mul_(weight)
        return linear(activated, self._down)


class Routed:
    """A routed layer: the router, its experts, and what all tokens share."""

    def __init__(self, spec: ModelSpec, weights: Weights, layer: int, dtype: torch.dtype) -> None:
        self._moe = spec.moe
        router = weights.router(layer)
        self._gate = router["gate"].float().contiguous().clone()  # [E, D]: chosen in float32, as published code does
        self._bias = router["bias"].float().clone() if "bias" in router else None
        self._experts = [Dense(weights.expert(layer, index), dtype) for index in range(spec.moe.num_experts)]
        self._shared = Dense(weights.shared(layer), dtype) if spec.moe.shared_width else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        moe = self._moe
        logits = torch.nn.functional.linear(x.float(), self._gate)  # [T, E]
        weights, experts = route(
            logits, moe.top_k, moe.routing, self._bias, moe.routed_scale, moe.num_groups, moe.top_groups
        )
        weights = weights.to(x.dtype)
        out = self._shared.forward(x) if self._shared is not None else torch.zeros_like(x)
        if x.shape[0] == 1:
            for expert, weight in zip(experts[0].tolist(), weights[0].split(1), strict=True):
                out += self._experts[expert].forward(x, weight)
            return out
        order = experts.flatten().argsort(stable=True)  # [T k] choices, grouped by expert
        rows = order.div(moe.top_k, rounding_mode="floor")
        weight = weights.flatten().index_select(0, order).unsqueeze(1)
        counts = torch.bincount(experts.flatten(), minlength=moe.num_experts).tolist()
        start = 0
        for expert, count in enumerate(counts):
            if count:
                chosen = rows[start : start + count]
                result = self._experts[expert].forward(x.index_select(0, chosen), weight[start : start + count])
                out.index_add_(0, chosen, result)
                start += count
        return out


class FFNHalf:
    """FFN side of `spec` in `dtype`. `weight_bytes` is what it holds."""

    def __init__(self, spec: ModelSpec, weights: Weights, dtype: torch.dtype) -> None:
        self.spec, self.dtype = spec, dtype
        self.weight_bytes = weight_bytes_ffn(spec, str(dtype).removeprefix("torch."))
        self._layers = [
            Dense(weights.dense(layer), dtype) if spec.is_dense(layer) else Routed(spec, weights, layer, dtype)
            for layer in range(spec.num_layers)
        ]

    def forward(self, layer: int, rows: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """FFN of `rows` [T, D] in `layer`, into `out` [T, D] where given."""
        result = self._layers[layer].forward(rows)
        return result if out is None else out.copy_(result)
