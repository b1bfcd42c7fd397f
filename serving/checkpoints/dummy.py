"""Seeded values in place of a checkpoint: the speed of a real configuration can be measured where its weights cannot be had.

Every tensor is a pure function of the seed and its name, so the order of reading does not matter and both pools of a
system agree. Scales keep activations of order one at any depth and greedy output from collapsing onto one token.
"""

from __future__ import annotations

import math
import zlib

import torch

from serving.checkpoints.names import EMBEDDING, HEAD, NamedWeights, all_shapes
from serving.spec import ModelSpec

_BLOCK_ELEMENTS = 1 << 20  # large tensors repeat a block of this size, rotated: filling is then a copy, not sampling


def tensor_scale(name: str, shape: tuple[int, ...], num_layers: int) -> float:
    """Standard deviation of a weight: 1/sqrt(fan in), and 2/sqrt(2 L) of that for what is added to the residual,
    so that what a token reads from its context weighs more than the token itself."""
    if name == EMBEDDING:
        return 1.0
    scale = 1.0 / math.sqrt(shape[-1])
    adds_to_residual = name.endswith(("o_proj.weight", "down_proj.weight", "w2.weight"))
    return 2.0 * scale / math.sqrt(2 * num_layers) if adds_to_residual else scale * (2.0 if name == HEAD else 1.0)


def seeded_tensor(name: str, shape: tuple[int, ...], num_layers: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    """The value of tensor `name` under `seed`: norms near one, biases small, matrices normal with `tensor_scale`."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))  # torch seeds with 32 bits
    count = math.prod(shape)
    sampled = torch.randn(min(count, _BLOCK_ELEMENTS), generator=generator)
    if name.endswith("norm.weight"):
        return (1.0 + 0.1 * sampled).view(shape).to(dtype)
    if len(shape) == 1:
        return (0.1 * sampled).view(shape).to(torch.float32)
    sampled = (sampled * tensor_scale(name, shape, num_layers)).to(dtype)
    if count <= _BLOCK_ELEMENTS:
        return sampled.view(shape)
    tensor = torch.empty(count, dtype=dtype)
    for number, part in enumerate(tensor.split(_BLOCK_ELEMENTS)):
        shift = (number * 7919) % _BLOCK_ELEMENTS  # neighbouring blocks must not be equal
        first = min(len(part), _BLOCK_ELEMENTS - shift)
        part[:first] = sampled[shift : shift + first]
        part[first:] = sampled[: len(part) - first]
    return tensor.view(shape)


class DummyWeights(NamedWeights):
    """All tensors of `spec` from a seed; nothing is kept."""

    def __init__(self, spec: ModelSpec, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__(spec)
        self._seed, self._dtype = seed, dtype
        self._shapes = all_shapes(spec)

    def tensor(self, name: str) -> torch.Tensor:
        return seeded_tensor(name, self._shapes[name], self.spec.num_layers, self._seed, self._dtype)
