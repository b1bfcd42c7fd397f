"""Where a half's finished tensors lie: where they were made, or where somebody who moves weights wants them."""

from __future__ import annotations

from collections.abc import Callable

import torch

# Takes a finished tensor and the unit it belongs to (its layer, or the number of layers for the final norm and the head);
# returns the tensor to use, of the same kind, shape and dtype.
Keep = Callable[[int, torch.Tensor], torch.Tensor]
KeepOne = Callable[[torch.Tensor], torch.Tensor]


def as_made(unit: int, tensor: torch.Tensor) -> torch.Tensor:
    return tensor
