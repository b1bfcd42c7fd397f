"""Rotary position tables for the scalings that these models use.

Pairs are rotated as x * cos + swap(x) * sin: `cos` repeats each angle's cosine for both channels of its pair and `sin`
carries the sign of the channel, so one multiply and one fused multiply-add rotate all heads at once.
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
    """`cos` and `sin` [positions, dim], signed as the module says, made for `max_positions` in steps as they are needed."""

    _GROW_POSITIONS = 4096

    def __init__(self, rope: RopeSpec, max_positions: int) -> None:
        self._rope = rope
        self._max_positions = max_positions
        self.cos = self.sin = torch.empty(0, rope.dim)
        self._extend(min(max_positions, self._GROW_POSITIONS))

    def rows(self, positions: torch.Tensor, last_position: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, sin) of `positions` [T], each [T, dim]; `last_position` is their maximum."""
        if last_position >= self.cos.shape[0]:
            wanted = -(-(last_position + 1) // self._GROW_POSITIONS) * self._GROW_POSITIONS
            self._extend(min(max(wanted, 2 * self.cos.shape[0]), max(self._max_positions, last_position + 1)))
        return self.cos.index_select(0, positions), self.sin.index_select(0, positions)

    def _extend(self, positions: int) -> None:
        angles = torch.outer(torch.arange(positions, dtype=torch.float32), inverse_frequencies(self._rope))
        temperature = attention_temperature(self._rope)
        cos, sin = angles.cos() * temperature, angles.sin() * temperature  # [P, dim / 2]
        if self._rope.interleaved:
            self.cos = torch.stack((cos, cos), -1).flatten(1)
            self.sin = torch.stack((-sin, sin), -1).flatten(1)
        else:
            self.cos, self.sin = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def rotate_(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> None:
    """Rotate `x` [T, heads, dim] in place by `cos` and `sin` [T, dim]."""
    rows, heads, dim = x.shape
    if interleaved:
        swapped = x.reshape(rows, heads, dim // 2, 2).flip(3).view(rows, heads, dim)
    else:
        swapped = x.reshape(rows, heads, 2, dim // 2).flip(2).view(rows, heads, dim)
    x.mul_(cos.unsqueeze(1).to(x.dtype)).addcmul_(swapped, sin.unsqueeze(1).to(x.dtype))
