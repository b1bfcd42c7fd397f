"""RMSNorm and RoPE with the KV write, against their references."""

from __future__ import annotations

import pytest
import torch

from kernels.rms_norm import reference as norm_reference
from kernels.rope import reference as rope_reference

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize("shape", [(1, 8), (3, 20), (7, 200), (2, 1030)], ids=str)
def test_rms_norm(shape, dtype, device, check):
    from kernels.rms_norm import triton as form

    x, residual = torch.randn(2, *shape, dtype=dtype, device=device)
    weight = torch.randn(shape[1], dtype=dtype, device=device)
    check("normed", form.rms_norm(x, weight, 1e-6), norm_reference.rms_norm(x, weight, 1e-6))
    actual, expected = (f.add_rms_norm(x, residual, weight, 1e-5) for f in (form, norm_reference))
    check("normed", actual[0], expected[0])
    check("sum", actual[1], expected[1])


def test_rms_norm_reads_rows_of_a_wider_tensor(device, check):
    from kernels.rms_norm import triton as form

    wide = torch.randn(5, 48, device=device)
    weight = torch.randn(16, device=device)
    check("normed", form.rms_norm(wide[:, 16:32], weight, 1e-6), norm_reference.rms_norm(wide[:, 16:32], weight, 1e-6))


def table(positions: int, half: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    angle = torch.rand(positions, half, device=device) * 6.28
    return angle.cos(), angle.sin()


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 8), (20, 20, 6), (9, 3, 24), (1, 1, 2)])
def test_rope_write_gqa(heads, kv_heads, dim, interleaved, dtype, device, check):
    from kernels.rope import triton as form

    tokens = 5
    fused = torch.randn(tokens, heads + 2 * kv_heads, dim, dtype=dtype, device=device)
    q, k, v = fused.split([heads, kv_heads, kv_heads], dim=1)
    cos, sin = table(11, dim // 2, device)
    positions = torch.tensor([0, 10, 3, 3, 7], dtype=torch.int32, device=device)
    slots = torch.tensor([9, 0, 4, 12, 1], device=device)
    caches = torch.zeros(2, 13, 2, kv_heads, dim, dtype=dtype, device=device)
    actual = form.rope_write_gqa(q, k, v, cos, sin, positions, caches[0], slots, interleaved)
    expected = rope_reference.rope_write_gqa(q, k, v, cos, sin, positions, caches[1], slots, interleaved)
    check("q", actual, expected)
    check("cache", caches[0], caches[1])
    assert not caches[0][[2, 3, 5]].any(), "a slot that no token owns was written"


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize(("heads", "rank", "rope_dim"), [(3, 24, 4), (20, 16, 8), (1, 5, 2)])
def test_rope_write_mla(heads, rank, rope_dim, interleaved, dtype, device, check):
    from kernels.rope import triton as form

    tokens = 4
    q = torch.randn(tokens, heads, rope_dim + 6, dtype=dtype, device=device)[..., 6:]
    latent = torch.randn(tokens, rank, dtype=dtype, device=device)
    k_rope = torch.randn(tokens, rank + rope_dim, dtype=dtype, device=device)[:, rank:]
    cos, sin = table(8, rope_dim // 2, device)
    positions, slots = torch.tensor([7, 0, 2, 5], device=device), torch.tensor([3, 8, 0, 5], device=device)
    caches = torch.zeros(2, 9, rank + rope_dim, dtype=dtype, device=device)
    actual, expected = (
        f.rope_write_mla(q, latent, k_rope, cos, sin, positions, cache, slots, interleaved)
        for f, cache in zip((form, rope_reference), caches, strict=True)
    )
    check("q_rope", actual, expected)
    check("cache", caches[0], caches[1])


def test_an_idle_token_writes_nothing(device, check):
    """A negative slot is a row that fills up a graph's batch: its neighbours are written as ever, and nothing else."""
    from kernels.rope import triton as form

    cos, sin = table(4, 4, device)
    positions, slots = torch.tensor([1, 0, 3], device=device), torch.tensor([2, -1, 0], device=device)
    kept = torch.tensor([0, 2], device=device)
    fused = torch.randn(3, 8, 8, device=device)
    q, k, v = fused.split([4, 2, 2], dim=1)
    caches = torch.zeros(2, 3, 2, 2, 8, device=device)
    form.rope_write_gqa(q, k, v, cos, sin, positions, caches[0], slots)
    rope_reference.rope_write_gqa(q[kept], k[kept], v[kept], cos, sin, positions[kept], caches[1], slots[kept])
    check("gqa cache", caches[0], caches[1])
    latent, caches = torch.randn(3, 16, device=device), torch.zeros(2, 3, 24, device=device)
    form.rope_write_mla(q, latent, k[:, 0], cos, sin, positions, caches[0], slots, False)
    rope_reference.rope_write_mla(
        q[kept], latent[kept], k[kept, 0], cos, sin, positions[kept], caches[1], slots[kept], False
    )
    check("mla cache", caches[0], caches[1])
