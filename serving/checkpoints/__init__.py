"""Where weights come from: published checkpoints read from a directory, small ones made here, or seeded values."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from serving.checkpoints.dummy import DummyWeights
from serving.checkpoints.reader import open_checkpoint
from serving.checkpoints.weights import Weights

if TYPE_CHECKING:
    from serving.interface import ServedModel

__all__ = ["DummyWeights", "Weights", "open_checkpoint", "open_weights"]


def open_weights(model: ServedModel) -> Weights:
    """The weights of a served model; a context manager. Raises UserError where the checkpoint cannot be used."""
    if model.dummy:
        return DummyWeights(model.spec, dtype=getattr(torch, model.dtype))
    return open_checkpoint(model.checkpoint, model.name)
