"""What each device of the weights pool holds: whole models, layers dealt out, or a slice of every layer. Pure.

`whole` keeps a model's FFN on one device, so one crossing has one answer, but a model must fit a device. `layer` deals every
model's layers over the devices, which evens out bytes and lets batches of one model work on several devices. `tensor` cuts
every layer by its width over all devices: each layer is computed by all of them, and their partial sums are added up.
"""

from __future__ import annotations

from collections.abc import Sequence

from serving.capacity import ffn_bytes
from serving.errors import UserError
from serving.interface import Device, ServedModel
from serving.parallel.ffn_part import FFNPart
from serving.parallel.share import Slice

FFN_SHARDINGS = ("whole", "layer", "tensor")

Held = dict[str, FFNPart]  # by model
Legs = tuple[tuple[tuple[int, int], ...], ...]


def share_out(models: Sequence[ServedModel], devices: Sequence[Device], sharding: str) -> list[Held]:
    """What each of `devices` holds. Raises :class:`UserError` where a width cannot be cut into as many parts."""
    if sharding == "tensor":
        parts = [FFNPart(width=Slice(rank, len(devices))) for rank in range(len(devices))]
        return [{model.name: part for model in models} for part in parts]
    free_bytes = [device.memory_bytes for device in devices]
    dealt: list[dict[str, list[int]]] = [{} for _ in devices]
    for model in sorted(models, key=ffn_bytes, reverse=True):
        layers = range(model.spec.num_layers)
        for piece in [tuple(layers)] if sharding == "whole" else [(layer,) for layer in layers]:
            index = max(range(len(devices)), key=free_bytes.__getitem__)
            dealt[index].setdefault(model.name, []).extend(piece)
            free_bytes[index] -= ffn_bytes(model, FFNPart(piece))
    return [{m.name: FFNPart(_unless_all(held[m.name], m)) for m in models if m.name in held} for held in dealt]


def _unless_all(layers: list[int], model: ServedModel) -> tuple[int, ...] | None:
    return None if len(layers) == model.spec.num_layers else tuple(layers)


def legs_of(model: ServedModel, pool: Sequence[Held]) -> Legs:
    """For each layer of `model` the (device, number of the model there) pairs that hold a part of it, in order of rank."""
    found = []
    for layer in range(model.spec.num_layers):
        legs = [
            (index, list(held).index(model.name))
            for index, held in enumerate(pool)
            if model.name in held and held[model.name].holds(layer)
        ]
        found.append(tuple(legs))
    return tuple(found)


def to_plain(pool: Sequence[Held]) -> list[dict[str, dict[str, object]]]:
    """The pool as a placement keeps it: by device, by model, its layers (None: all) and its slice of the width."""
    return [
        {
            name: {
                "layers": None if part.layers is None else list(part.layers),
                "width": [part.width.index, part.width.parts],
            }
            for name, part in held.items()
        }
        for held in pool
    ]


def from_plain(plain: Sequence[dict[str, dict[str, object]]]) -> list[Held]:
    """The inverse of :func:`to_plain`."""
    return [
        {
            name: FFNPart(None if part["layers"] is None else tuple(part["layers"]), Slice(*part["width"]))
            for name, part in held.items()
        }
        for held in plain
    ]


def require_known(sharding: str) -> None:
    """Raises :class:`UserError` that lists the known ways."""
    if sharding not in FFN_SHARDINGS:
        raise UserError(f"option ffn_sharding is {sharding!r}; known: {', '.join(FFN_SHARDINGS)}")
