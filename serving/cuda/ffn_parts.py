"""The FFN halves of one model on cards: one of all its layers, or several that hold some each, on one card or on more."""

from __future__ import annotations

import torch

from serving.cuda.layers import CardFFNHalf


class FFNParts:
    """`halves` hold every layer of their model once. Raises ValueError where one is missing or held twice."""

    def __init__(self, *halves: CardFFNHalf) -> None:
        self.halves, self.spec, self.dtype = halves, halves[0].spec, halves[0].dtype
        self._by_layer = {layer: half for half in halves for layer in half.layers}
        held = sorted(layer for half in halves for layer in half.layers)
        if held != list(range(self.spec.num_layers)):
            raise ValueError(f"FFN halves of {self.spec.name} hold layers {held} of {self.spec.num_layers}")
        self.cards = tuple(dict.fromkeys(half.device for half in halves))

    def half(self, layer: int) -> CardFFNHalf:
        """Who holds `layer`."""
        return self._by_layer[layer]

    def layers_on(self, card: torch.device) -> list[int]:
        """The layers that are computed on `card`, in the order of a step."""
        return [layer for layer in sorted(self._by_layer) if self._by_layer[layer].device == card]

    def forward(self, layer: int, rows: torch.Tensor) -> torch.Tensor:
        """FFN of `rows` [T, D], which lie on the layer's card: [T, D]."""
        return self._by_layer[layer].forward(layer, rows)
