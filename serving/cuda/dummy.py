"""Seeded values made on the card: filling tens of gigabytes there takes seconds, where the CPU's take minutes."""

from __future__ import annotations

import zlib

import torch

from serving.checkpoints.dummy import tensor_scale
from serving.checkpoints.names import NamedWeights, all_shapes
from serving.spec import ModelSpec


class CardDummyWeights(NamedWeights):
    """All tensors of `spec` from a seed, with the scales of :class:`serving.checkpoints.DummyWeights` but not its values."""

    def __init__(self, spec: ModelSpec, device: torch.device, dtype: torch.dtype, seed: int = 0) -> None:
        super().__init__(spec)
        self._seed, self._dtype, self._device = seed, dtype, device
        self._shapes = all_shapes(spec)

    def tensor(self, name: str) -> torch.Tensor:
        generator = torch.Generator(self._device).manual_seed(zlib.crc32(f"{self._seed}:{name}".encode()))
        shape = self._shapes[name]
        vector = len(shape) == 1
        kind = torch.float32 if vector else self._dtype
        sampled = torch.randn(shape, generator=generator, device=self._device, dtype=kind)
        if name.endswith("norm.weight"):
            return (1.0 + 0.1 * sampled).to(self._dtype)
        return 0.1 * sampled if vector else sampled * tensor_scale(name, shape, self.spec.num_layers)
