"""A model's weights as one stretch of bytes, the same in host memory and on a device: what is copied, in which order.

Halves are built with :meth:`Placer.keep`, which gives every tensor its place in the stretch. A *unit* is what must be there
before a layer can run: embedding and layer 0, then a layer each, last the final norm and the head.
"""

from __future__ import annotations

import ctypes

import torch

from serving.capacity import attention_bytes, ffn_bytes
from serving.checkpoints import Weights, open_weights
from serving.checkpoints.names import NamedWeights, all_shapes
from serving.interface import ServedModel
from serving.layers.attention_half import AttentionHalf
from serving.layers.ffn_half import FFNHalf
from serving.residency.tensors import address_of, stored_bytes, tensor_at
from serving.spec import ModelSpec

ALIGN_BYTES = 64
PAGE_BYTES = 65536  # of an arena
Extent = tuple[int, int]  # offset and length in bytes


def image_bytes(model: ServedModel, page_bytes: int = PAGE_BYTES) -> int:
    """At most so many bytes are a model's weights as an image, whole pages: packed weights and what alignment adds."""
    count_bytes = attention_bytes(model) + ffn_bytes(model) + alignment_bytes(model.spec)
    return -(-count_bytes // page_bytes) * page_bytes


def alignment_bytes(spec: ModelSpec) -> int:
    """At most so many bytes lie between the tensors of both halves."""
    return (8 + spec.num_layers * (16 + 2 * spec.moe.num_experts)) * ALIGN_BYTES


CARD_FRAME_BYTES = 32 << 20  # of a card's arena: mapping costs by the page, so pages are large
_CARD_ALIGN_BYTES = 256
_CARD_TENSORS_PER_LAYER = 32  # at most


def placed_bytes(model: ServedModel, kind: str, page_bytes: int = PAGE_BYTES) -> int:
    """Bytes that the model's image takes on a device of `kind`, whole pages. A card keeps routers in its own dtype too, and takes
    whole frames."""
    if kind != "cuda":
        return image_bytes(model, page_bytes)
    spec = model.spec
    routers = spec.num_layers * spec.moe.num_experts * spec.hidden_size * getattr(torch, model.dtype).itemsize
    aligned = (spec.num_layers + 1) * _CARD_TENSORS_PER_LAYER * _CARD_ALIGN_BYTES
    needed = attention_bytes(model) + ffn_bytes(model) + routers + aligned
    frames_bytes = -(-needed // CARD_FRAME_BYTES) * CARD_FRAME_BYTES
    return -(-frames_bytes // page_bytes) * page_bytes


def num_units(model: ServedModel) -> int:
    return model.spec.num_layers + 1


class Placer:
    """Gives tensors their places in the `limit_bytes` from `address` on, and with `write` puts their bytes there."""

    def __init__(self, address: int, limit_bytes: int, units: int, write: bool) -> None:
        self._address, self._write = address, write
        self._limit_bytes = limit_bytes
        self.used_bytes = 0
        self.units: list[list[Extent]] = [[] for _ in range(units)]

    def keep(self, unit: int, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` at its place, as part of `unit`."""
        count_bytes = stored_bytes(tensor)
        start = -(-self.used_bytes // ALIGN_BYTES) * ALIGN_BYTES
        self.used_bytes = start + count_bytes
        if self.used_bytes > self._limit_bytes:
            raise RuntimeError(f"an image of {self._limit_bytes} bytes was planned and is too small")
        extents = self.units[unit]
        if extents and start - sum(extents[-1]) < ALIGN_BYTES:
            extents[-1] = (extents[-1][0], self.used_bytes - extents[-1][0])
        else:
            extents.append((start, count_bytes))
        if self._write:
            ctypes.memmove(self._address + start, address_of(tensor), count_bytes)
        return tensor_at(self._address + start, tensor)


class ShapesOnly(NamedWeights):
    """Zeros of a model's shapes, for who needs the tensors' form and has their bytes from elsewhere."""

    def __init__(self, spec) -> None:
        super().__init__(spec)
        self._shapes = all_shapes(spec)

    def tensor(self, name: str) -> torch.Tensor:
        return torch.zeros(()).expand(self._shapes[name])


def build_halves(model: ServedModel, placer: Placer, weights: Weights) -> tuple[AttentionHalf, FFNHalf]:
    """Both halves of `model` over the placer's memory."""
    dtype = getattr(torch, model.dtype)
    with weights:
        return AttentionHalf(model.spec, weights, dtype, placer.keep), FFNHalf(
            model.spec, weights, dtype, keep=placer.keep
        )


def _placer(model: ServedModel, address: int, write: bool) -> Placer:
    return Placer(address, image_bytes(model), num_units(model), write)


def halves_over(model: ServedModel, address: int) -> tuple[AttentionHalf, FFNHalf]:
    """Both halves over the memory at `address`, which is not touched: weights come there later."""
    return build_halves(model, _placer(model, address, write=False), ShapesOnly(model.spec))


def write_image(model: ServedModel, address: int) -> tuple[list[list[Extent]], int]:
    """Read a model's checkpoint and write its image to `address`; returns its units and its length in bytes."""
    placer = _placer(model, address, write=True)
    build_halves(model, placer, open_weights(model))
    return placer.units, placer.used_bytes
