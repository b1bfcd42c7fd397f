"""One rank of a group on its card: the share of a model that it holds, and its part of every step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from kernels.lm_head import greedy
from serving.cuda.layers import CardAttentionHalf, CardFFNHalf
from serving.cuda.layout import CardLayout
from serving.memory.kv_pool import ModelKV


class Rows(Protocol):
    """How a rank's rows meet those of the other ranks, on its stream and inside a capture too."""

    def over_heads(self, partial: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks of this replica of `partial` [T, D]."""
        ...

    def of_all_replicas(self, rows: torch.Tensor) -> torch.Tensor:
        """`rows` [T, D] of every replica, in order: [dp * T, D]."""
        ...

    def over_width(self, partial: torch.Tensor) -> torch.Tensor:
        """This replica's rows [T, D] of the sum over all ranks of `partial` [dp * T, D]."""
        ...

    def of_all_heads(self, pairs: torch.Tensor) -> torch.Tensor:
        """`pairs` [W, 2] float32 of every rank of this replica, in order: [tp * W, 2]."""
        ...


@dataclass(frozen=True)
class CardRank:
    """What a rank holds; its part of the vocabulary begins at `first_token`, and `tp` ranks share its replica's heads."""

    attention: CardAttentionHalf
    ffn: CardFFNHalf
    kv: ModelKV
    blocks: torch.Tensor  # 0, 1, 2... of one run
    tp: int
    first_token: int

    @property
    def device(self) -> torch.device:
        return self.attention.device

    def forward(self, layout: CardLayout, sources: torch.Tensor | None, rows: Rows) -> torch.Tensor:
        """The next token of every row wanted in this replica, [rows wanted] int64, the same on all its ranks. `sources` [dp * T]
        says whose FFN rows stand for each row of the gathered ones (None: there is one replica): an idle row repeats another,
        since experts that nobody needs would be read for what it holds."""
        half = self.attention
        hidden, ffn_out = self._embed(layout.token_ids, rows), None
        for layer in range(half.spec.num_layers):
            attended, hidden = half.attend_heads(layer, hidden, ffn_out, self.kv.layers[layer], layout)
            hidden, ffn_in = half.after_attention(layer, rows.over_heads(attended), hidden)
            if sources is not None:
                ffn_in = rows.of_all_replicas(ffn_in).index_select(0, sources)
            ffn_out = rows.over_width(self.ffn.forward(layer, ffn_in))
        return self._sample(half.logits(hidden, ffn_out, layout), rows)

    def _embed(self, token_ids: torch.Tensor, rows: Rows) -> torch.Tensor:
        """Hidden rows: each rank looks up the tokens in its part of the vocabulary, and has zeros for the others."""
        if self.tp == 1:
            return self.attention.embed(token_ids)
        place = token_ids - self.first_token
        held = (place >= 0) & (place < self.attention.spec.vocab_size)
        return rows.over_heads(self.attention.embed(torch.where(held, place, 0)) * held[:, None])

    def _sample(self, logits: torch.Tensor, rows: Rows) -> torch.Tensor:
        """Greedy over all parts of the vocabulary; ties go to the lower token. Float32 holds every token's number."""
        best = greedy(logits)
        if self.tp == 1:
            return best
        own = torch.cat([logits.amax(1, keepdim=True), (best[:, None] + self.first_token).float()], dim=1)
        first, *others = rows.of_all_heads(own).view(self.tp, -1, 2)
        for other in others:
            first = torch.where((other[:, 0] > first[:, 0])[:, None], other, first)
        return first[:, 1].long()
