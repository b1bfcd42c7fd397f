"""One layer of multi-head latent attention in absorbed form: the cache holds latents, and queries come to meet them.

score = (q_nope W_UK) . c + q_rope . k_rope, output = (sum p c) W_UV (DeepSeek-V2, section 2.1.2), so the latent of a token
is read once for both products and never expanded to heads.
"""

from __future__ import annotations

import torch

from kernels.linear import linear, pack
from kernels.mla import prefill_mla
from kernels.rms_norm import rms_norm
from kernels.rope.cpu import adjacent_pairs, rotate_pairs_
from serving.layers.batch import BatchLayout
from serving.layers.keep import KeepOne
from serving.spec import ModelSpec, yarn_softmax_factor

_LATENT_NORM_EPS = 1e-6  # fixed in the published code, whatever the model's own


class MLALayer:
    """The down-projections of queries and latents are one packed product. Rotary channels are kept with pairs side by
    side, in the cache too."""

    def __init__(self, spec: ModelSpec, tensors: dict[str, torch.Tensor], dtype: torch.dtype, keep: KeepOne) -> None:
        attention = spec.attention
        self._attention = attention
        self._scale = attention.softmax_scale * yarn_softmax_factor(spec.rope)

        def paired(role: str, heads: int) -> torch.Tensor:
            """`role`'s matrix, whose output is `heads` equal parts with the rotary channels last in each."""
            tensor = tensors[role].to(dtype)
            if spec.rope.interleaved:
                return tensor
            kept, rotary = tensor.view(heads, -1, tensor.shape[1]).split_with_sizes(
                [tensor.shape[0] // heads - attention.rope_dim, attention.rope_dim], dim=1
            )
            rotary = adjacent_pairs(rotary.reshape(-1, tensor.shape[1]), attention.rope_dim).view(rotary.shape)
            return torch.cat([kept, rotary], dim=1).view(tensor.shape)

        heads = attention.num_heads
        first = paired("q", heads) if attention.q_rank is None else tensors["q_a"].to(dtype)
        self._down = keep(pack(torch.cat([first, paired("kv_a", 1)])))
        if attention.q_rank is not None:
            self._q_a_norm = keep(tensors["q_a_norm"].to(dtype, copy=True))
            self._q_b = keep(pack(paired("q_b", heads)))
        self._kv_norm = keep(tensors["kv_a_norm"].to(dtype, copy=True))
        expand = tensors["kv_b"].to(dtype).view(heads, -1, attention.kv_rank)
        self._w_uk = keep(expand[:, : attention.nope_dim].contiguous())  # [H, nope, rank]
        self._w_uv = keep(expand[:, attention.nope_dim :].transpose(1, 2).contiguous())  # [H, rank, value]
        self._o = keep(pack(tensors["o"].to(dtype)))

    def forward(self, x: torch.Tensor, cache: torch.Tensor, layout: BatchLayout) -> torch.Tensor:
        """Attention of `x` [T, D]; latents of the rows are written to `cache` [slots, rank + rope] first. Result [T, D]."""
        attention, rows = self._attention, x.shape[0]
        rank, nope_dim, entry = attention.kv_rank, attention.nope_dim, attention.kv_elements_per_token
        down = linear(x, self._down)
        query, latent = down[:, :-entry], down[:, -entry:]  # [T, ...], [T, rank + rope]
        if attention.q_rank is not None:
            query = linear(rms_norm(query, self._q_a_norm, _LATENT_NORM_EPS), self._q_b)
        query = query.view(rows, attention.num_heads, attention.qk_dim)
        latent[:, :rank] = rms_norm(latent[:, :rank], self._kv_norm, _LATENT_NORM_EPS)
        rotate_pairs_(latent[:, rank:].unsqueeze(1), layout.turns)
        rotate_pairs_(query[:, :, nope_dim:], layout.turns)
        cache.index_copy_(0, layout.slots, latent)
        absorbed = torch.bmm(query[:, :, :nope_dim].transpose(0, 1), self._w_uk).transpose(0, 1)  # [T, H, rank]
        attended = prefill_mla(absorbed, query[:, :, nope_dim:], layout.runs(cache), layout.query_lens, self._scale)
        out = torch.bmm(attended.transpose(0, 1), self._w_uv).transpose(0, 1)  # [T, H, value]
        return linear(out.reshape(rows, -1), self._o)
