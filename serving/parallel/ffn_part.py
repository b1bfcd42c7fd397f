"""Which part of a model's FFN one weights device holds: all of it, some of its layers, or a slice of every layer's width.

A part of some layers computes those layers' rows alone. Parts of the width each compute every row: their outputs are partial
sums, which the attention side adds in order of rank, so that a run repeats bit for bit.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from serving.interface import ServedModel
from serving.parallel.share import Share, Slice, share_spec

_WHOLE_WIDTH = Slice()


@dataclass(frozen=True)
class FFNPart:
    """`layers` that it holds (None: all), and its slice of their `width`."""

    layers: tuple[int, ...] | None = None
    width: Slice = _WHOLE_WIDTH

    @property
    def share(self) -> Share:
        return Share(width=self.width)

    def holds(self, layer: int) -> bool:
        return self.layers is None or layer in self.layers

    def model(self, model: ServedModel) -> ServedModel:
        """`model` with FFNs as narrow as the part's; raises :class:`UserError` where they cannot be cut so."""
        return model if self.width.parts == 1 else dataclasses.replace(model, spec=share_spec(model.spec, self.share))


WHOLE_FFN = FFNPart()
