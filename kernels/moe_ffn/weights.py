"""The routed experts' weights of one layer, as the reference and the CUDA form read them."""

from __future__ import annotations

from typing import NamedTuple

import torch


class ExpertWeights(NamedTuple):
    """`gate_up` [E, 2W, D]: the gate's W rows, then the up projection's; `down` [E, D, W]. Both contiguous."""

    gate_up: torch.Tensor
    down: torch.Tensor
