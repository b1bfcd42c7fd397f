"""One layer of multi-head latent attention in absorbed form: the cache holds latents, and queries come to meet them.

score = (q_nope W_UK) . c + q_rope . k_rope, output = (sum p c) W_UV (DeepSeek-V2, section 2.1.2), so the latent of a token
is read once for both products and never expanded to heads.
"""

from __future__ import annotations

import torch

from kernels.linear import linear, pack
from serving.layers.batch import BatchLayout
from serving.layers.gqa import causal_mask
from serving.layers.norm import rms_norm
from serving.layers.rope import rotate_
from serving.spec import ModelSpec, yarn_softmax_factor


class MLALayer:
    """The down-projections of queries and latents are one packed product."""

    def __init__(self, spec: ModelSpec, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
        attention = spec.attention
        self._spec, self._attention = spec, attention
        self._scale = attention.softmax_scale * yarn_softmax_factor(spec.rope)
        first = tensors["q"] if attention.q_rank is None else tensors["q_a"]
        self._down = pack(torch.cat([first, tensors["kv_a"]]).to(dtype))
        self._q_rank = attention.q_rank
        if attention.q_rank is not None:
            self._q_a_norm = tensors["q_a_norm"].to(dtype, copy=True)
            self._q_b = pack(tensors["q_b"].to(dtype))
        self._kv_norm = tensors["kv_a_norm"].to(dtype, copy=True)
        expand = tensors["kv_b"].to(dtype).view(attention.num_heads, -1, attention.kv_rank)
        self._w_uk = expand[:, : attention.nope_dim].contiguous()  # [H, nope, rank]
        self._w_uv = expand[:, attention.nope_dim :].transpose(1, 2).contiguous()  # [H, rank, value]
        self._o = pack(tensors["o"].to(dtype))

    def forward(self, x: torch.Tensor, cache: torch.Tensor, layout: BatchLayout) -> torch.Tensor:
        """Attention of `x` [T, D]; latents of the rows are written to `cache` [slots, rank + rope] first. Result [T, D]."""
        attention, rows = self._attention, x.shape[0]
        heads, rank, rope_dim, nope_dim = (
            attention.num_heads,
            attention.kv_rank,
            attention.rope_dim,
            attention.nope_dim,
        )
        down = linear(x, self._down)
        latent = down[:, -(rank + rope_dim) :]  # [T, rank + rope]
        query = down[:, : -(rank + rope_dim)]
        if self._q_rank is not None:
            query = linear(rms_norm(query, self._q_a_norm, 1e-6), self._q_b)
        query = query.reshape(rows, heads, attention.qk_dim)
        latent[:, :rank] = rms_norm(latent[:, :rank], self._kv_norm, 1e-6)
        interleaved = self._spec.rope.interleaved
        rotate_(latent[:, rank:].unsqueeze(1), *layout.rope, interleaved)
        rotate_(query[:, :, nope_dim:], *layout.rope, interleaved)
        cache.index_copy_(0, layout.slots, latent)
        absorbed = torch.empty(heads, rows, rank + rope_dim, dtype=x.dtype)
        torch.bmm(query[:, :, :nope_dim].transpose(0, 1), self._w_uk, out=absorbed[:, :, :rank])
        absorbed[:, :, rank:] = query[:, :, nope_dim:].transpose(0, 1)
        attended = torch.empty(heads, rows, rank, dtype=x.dtype)  # sum p c
        row = 0
        for count, length, start in zip(layout.query_lens, layout.kv_lens, layout.run_starts, strict=True):
            run = cache[start : start + length]  # [length, rank + rope]
            wanted = absorbed[:, row : row + count]  # [H, n, rank + rope]
            scores = torch.matmul(wanted.reshape(-1, rank + rope_dim), run.t()).view(heads, count, length)
            scores = scores.float().mul_(self._scale)
            if count > 1:
                scores += causal_mask(count, length, torch.float32)
            weights = scores.softmax(-1).to(x.dtype)
            attended[:, row : row + count] = torch.matmul(weights.view(-1, length), run[:, :rank]).view(
                heads, count, rank
            )
            row += count
        out = torch.bmm(attended, self._w_uv).transpose(0, 1)  # [T, H, value]
        return linear(out.reshape(rows, -1), self._o)
