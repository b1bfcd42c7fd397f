"""What the resident executor knows of its models: one row of sizes and one of weight pointers a layer, in device memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kernels.moe_ffn.weights import ExpertWeights
from kernels.router.reference import RULES

# Columns of the layer table (int64). Pointers are 0 where a layer has no such weights.
COLUMNS = (
    "router",
    "bias",
    "gate_up",
    "down",
    "shared_gate_up",
    "shared_down",
    "depth",
    "width",
    "shared_width",
    "num_experts",
    "top_k",
    "rule",
    "num_groups",
    "top_groups",
)
SIZE_MULTIPLE = 16  # elements: what 16-byte reads of a row's slices need, at run-time sizes the compiler cannot check


@dataclass(frozen=True)
class FFNLayer:
    """The FFN of one layer: routed experts (`router` [E, D], `experts`), a shared or dense FFN (`shared_gate_up` [2W, D],
    `shared_down` [D, W]), or both. `bias` [E] float32 is the router's correction, for `sigmoid_bias`."""

    router: torch.Tensor | None = None
    experts: ExpertWeights | None = None
    shared_gate_up: torch.Tensor | None = None
    shared_down: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    top_k: int = 0
    rule: str = RULES[0]
    routed_scale: float = 1.0
    num_groups: int = 1
    top_groups: int = 1

    def __post_init__(self) -> None:
        if self.experts is None and self.shared_down is None:
            raise ValueError("an FFN layer needs experts, a shared FFN, or both")
        if (self.router is None) != (self.experts is None):
            raise ValueError("experts need a router, and a router needs experts")
        for name, tensor in self.tensors.items():
            if tensor is not None and not tensor.is_contiguous():
                raise ValueError(f"{name}: the executor reads weights by pointer, so they must be contiguous")

    @property
    def tensors(self) -> dict[str, torch.Tensor | None]:
        """The weights by column of the layer table."""
        return {
            "router": self.router,
            "bias": self.bias,
            "gate_up": None if self.experts is None else self.experts.gate_up,
            "down": None if self.experts is None else self.experts.down,
            "shared_gate_up": self.shared_gate_up,
            "shared_down": self.shared_down,
        }

    @property
    def depth(self) -> int:
        return self.shared_down.shape[0] if self.experts is None else self.experts.down.shape[1]

    @property
    def width(self) -> int:
        return 0 if self.experts is None else self.experts.down.shape[2]

    @property
    def shared_width(self) -> int:
        return 0 if self.shared_down is None else self.shared_down.shape[1]

    @property
    def num_experts(self) -> int:
        return 0 if self.router is None else self.router.shape[0]

    def active_experts(self, rows: int) -> int:
        """The most experts that `rows` rows can choose."""
        return min(self.num_experts, rows * self.top_k)


@dataclass(frozen=True)
class LayerTable:
    """All layers of all models: `entries` [layers, columns] int64, `scales` [layers] float32, and where in them each model
    begins, `first_layer` [models] int32. Holds the layers, so that no weight is freed under a pointer."""

    layers: tuple[FFNLayer, ...]
    entries: torch.Tensor
    scales: torch.Tensor
    first_layer: torch.Tensor

    @classmethod
    def build(cls, models: Sequence[Sequence[FFNLayer]], device: torch.device) -> LayerTable:
        """The table of `models`, each a sequence of layers. Raises ValueError for sizes that the kernel cannot read."""
        layers = tuple(layer for model in models for layer in model)
        for layer in layers:
            sizes = (layer.depth, layer.width, layer.shared_width)
            if device.type == "cuda" and any(size % SIZE_MULTIPLE for size in sizes):
                raise ValueError(f"sizes {sizes} of an FFN layer must be multiples of {SIZE_MULTIPLE}")
        entries = torch.tensor([_entry(layer) for layer in layers], dtype=torch.int64, device=device)
        scales = torch.tensor([layer.routed_scale for layer in layers], dtype=torch.float32, device=device)
        starts = [sum(len(model) for model in models[:index]) for index in range(len(models))]
        return cls(layers, entries, scales, torch.tensor(starts, dtype=torch.int32, device=device))


def _entry(layer: FFNLayer) -> list[int]:
    values = {name: 0 if tensor is None else tensor.data_ptr() for name, tensor in layer.tensors.items()}
    values |= {
        "depth": layer.depth,
        "width": layer.width,
        "shared_width": layer.shared_width,
        "num_experts": layer.num_experts,
        "top_k": layer.top_k,
        "rule": RULES.index(layer.rule),
        "num_groups": layer.num_groups,
        "top_groups": layer.top_groups,
    }
    return [values[column] for column in COLUMNS]
