"""The FFN halves of one model on cards: one of all its layers, several that hold some each, or several that hold a slice of every
layer's width each."""

from __future__ import annotations

import torch

from serving.cuda.layers import CardFFNHalf


class FFNParts:
    """`halves` hold every layer of their model once or, where it is `cut` by width, each a slice of all. Raises ValueError where
    a layer is missing or held twice, or two slices lie on one card."""

    def __init__(self, *halves: CardFFNHalf, cut: bool = False) -> None:
        self.halves, self.spec, self.dtype, self.cut = halves, halves[0].spec, halves[0].dtype, cut
        self.cards = tuple(dict.fromkeys(half.device for half in halves))
        self._by_layer = {layer: half for half in halves for layer in half.layers}
        every = list(range(self.spec.num_layers))
        held = [sorted(half.layers) for half in halves] if cut else [sorted(n for half in halves for n in half.layers)]
        if any(layers != every for layers in held):
            raise ValueError(f"FFN halves of {self.spec.name} hold layers {held} of {self.spec.num_layers}")
        if cut and len(self.cards) < len(halves):
            raise ValueError(f"{len(halves)} slices of {self.spec.name} lie on {len(self.cards)} cards")

    def halves_of(self, layer: int) -> tuple[CardFFNHalf, ...]:
        """Whose outputs add up to the FFN of `layer`: all slices, or the one that holds it."""
        return self.halves if self.cut else (self._by_layer[layer],)

    def half(self, layer: int) -> CardFFNHalf:
        """Who holds `layer`, of a model that is not cut."""
        return self._by_layer[layer]

    def layers_on(self, card: torch.device) -> list[int]:
        """The layers that are computed on `card`, in the order of a step."""
        return sorted({layer for half in self.halves if half.device == card for layer in half.layers})

    def forward(self, layer: int, rows: torch.Tensor) -> torch.Tensor:
        """FFN of `rows` [T, D], which lie on the layer's card: [T, D]."""
        return self._by_layer[layer].forward(layer, rows)
