"""The cosines and sines that a model's rotary embedding reads, built once by whoever knows its scaling."""

from __future__ import annotations

from typing import NamedTuple

import torch


class RopeTable(NamedTuple):
    """`cos` and `sin`, both [positions, dim / 2] float32, attention temperature (YaRN) already multiplied in."""

    cos: torch.Tensor
    sin: torch.Tensor
