"""The routed experts' weights of one layer, as every form reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Self

import numpy as np
import torch

from kernels import native
from kernels.linear import pack


class ExpertWeights(NamedTuple):
    """`gate_up` [E, 2W, D]: the gate's W rows, then the up projection's; `down` [E, D, W]. Both contiguous."""

    gate_up: torch.Tensor
    down: torch.Tensor


class PackedExperts(NamedTuple):
    """The same for the CPU form: E packed matrices each (:func:`kernels.linear.pack`), and where they lie ([E] int64). The
    addresses hold as long as the tensors do."""

    gate_up: Sequence[torch.Tensor]
    down: Sequence[torch.Tensor]
    gate_up_addresses: np.ndarray
    down_addresses: np.ndarray

    @classmethod
    def of(cls, gate_up: Sequence[torch.Tensor], down: Sequence[torch.Tensor]) -> Self:
        """The packed matrices of all experts, joined gate and up [2W, D] and down [D, W]."""
        addresses = (np.array([native.address(matrix) for matrix in stack], np.int64) for stack in (gate_up, down))
        return cls(gate_up, down, *addresses)

    @classmethod
    def pack(cls, weights: ExpertWeights) -> Self:
        """Plain weights, packed."""
        return cls.of(*([pack(matrix) for matrix in stack] for stack in weights))
