"""The routed experts' weights of one layer, as every form reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch


class ExpertWeights(NamedTuple):
    """`gate_up` [E, 2W, D]: the gate's W rows, then the up projection's; `down` [E, D, W]. Both contiguous. The CPU form
    also takes a sequence of E packed matrices for each (:func:`kernels.linear.pack`)."""

    gate_up: torch.Tensor | Sequence[torch.Tensor]
    down: torch.Tensor | Sequence[torch.Tensor]
