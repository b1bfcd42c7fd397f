"""Rotary position tables for the scalings that these models use.

A pair of channels is turned as one complex number, so a table holds complex numbers: the turn of each pair at a position.
"""

from __future__ import annotations

import math

import torch

from serving.spec import RopeSpec, yarn_mscale


def inverse_frequencies(rope: RopeSpec) -> torch.Tensor:
    """Angles per position, [dim / 2] float32: theta^(-2i/dim), scaled linearly or by YaRN (arXiv 2309.00071, sec. 3.2)."""
    exponents = torch.arange(0, rope.dim, 2, dtype=torch.float32) / rope.dim
    frequencies = 1.0 / rope.theta**exponents
    if rope.scaling == "linear":
        return frequencies / rope.factor
    if rope.scaling != "yarn":
        return frequencies

    def channel_of(rotations: float) -> float:
        """The channel whose wave makes `rotations` turns over the original context."""
        wavelength = rope.original_context_tokens / (rotations * 2 * math.pi)
        return rope.dim * math.log(wavelength) / (2 * math.log(rope.theta))

    low = max(math.floor(channel_of(rope.beta_fast)), 0)
    high = min(math.ceil(channel_of(rope.beta_slow)), rope.dim - 1)
    ramp = (torch.arange(rope.dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
    keep = 1.0 - ramp.clamp(0, 1)  # fast channels keep their frequency, slow ones are interpolated
    return frequencies / rope.factor * (1 - keep) + frequencies * keep


def attention_temperature(rope: RopeSpec) -> float:
    """What YaRN multiplies cosines and sines by; DeepSeek divides its two mscales, which usually cancel."""
    if rope.scaling != "yarn":
        return 1.0
    if rope.mscale and rope.mscale_all_dim:
        return yarn_mscale(rope.factor, rope.mscale) / yarn_mscale(rope.factor, rope.mscale_all_dim)
    return yarn_mscale(rope.factor, 1.0)


class RotaryTable:
    """`turns` [positions, dim / 2] complex64, made for `max_positions` in steps as they are needed."""

    _GROW_POSITIONS = 4096

    def __init__(self, rope: RopeSpec, max_positions: int) -> None:
        self._rope = rope
        self._max_positions = max_positions
        self.turns = torch.empty(0, rope.dim // 2, dtype=torch.complex64)
        self._extend(min(max_positions, self._GROW_POSITIONS))

    def rows(self, positions: torch.Tensor, last_position: int) -> torch.Tensor:
        """Turns of `positions` [T], [T, 1, dim / 2]; `last_position` is their maximum."""
        if last_position >= self.turns.shape[0]:
            wanted = -(-(last_position + 1) // self._GROW_POSITIONS) * self._GROW_POSITIONS
            self._extend(min(max(wanted, 2 * self.turns.shape[0]), max(self._max_positions, last_position + 1)))
        return self.turns.index_select(0, positions).unsqueeze(1)

    def _extend(self, positions: int) -> None:
        angles = torch.outer(torch.arange(positions, dtype=torch.float32), inverse_frequencies(self._rope))
        self.turns = torch.polar(torch.full_like(angles, attention_temperature(self._rope)), angles)  # [P, dim / 2]
