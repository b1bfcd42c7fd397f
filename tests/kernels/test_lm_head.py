"""The choice of the next token: argmax against the reference, and what sampling may and may not draw."""

from __future__ import annotations

import pytest
import torch

from kernels import lm_head
from kernels.lm_head import reference

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize("vocabulary", [1, 37, 4096, 4097, 9000])
def test_greedy(vocabulary, dtype, device, check):
    from kernels.lm_head import triton as form

    logits = torch.randperm(vocabulary, device=device).float().repeat(3, 1)
    logits[1] = logits[1].flip(0)
    logits = (logits / 8192).to(torch.float32 if vocabulary > 256 else dtype)
    check("token", form.greedy(logits), reference.greedy(logits))


def test_sample_draws_from_the_nucleus_only():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().repeat(400, 1)
    drawn = lm_head.sample(logits, 1.0, 0.7, torch.Generator().manual_seed(1))
    assert set(drawn.tolist()) == {0, 1}


def test_sample_follows_the_temperature():
    logits = torch.tensor([[0.8, 0.2]]).log().repeat(4000, 1)
    hot = lm_head.sample(logits, 2.0, 1.0, torch.Generator().manual_seed(1)).float().mean()
    assert abs(float(hot) - 1 / 3) < 0.03  # sqrt(0.2) / (sqrt(0.8) + sqrt(0.2))


def test_temperature_zero_is_greedy():
    logits = torch.randn(5, 11)
    assert lm_head.sample(logits, 0.0, 0.1).equal(lm_head.greedy(logits))


def test_sample_is_reproducible():
    logits = torch.randn(8, 50)
    first, second = (lm_head.sample(logits, 1.0, 0.9, torch.Generator().manual_seed(7)) for _ in range(2))
    assert first.equal(second)
