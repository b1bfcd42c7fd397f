"""One rank of a group on its card, its peers absent: what it computes of a part, whole and each side alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence as Seq

import torch

from serving.cuda.groups.rank import CardRank
from serving.cuda.groups.rows import AloneRows
from serving.cuda.layout import CardLayout
from serving.parallel.group import GroupPlan


class PostedRows(AloneRows):
    """In the place of what all replicas post stand `posted` [rows, D], which differ as theirs do: copies of a rank's own rows
    would choose the same experts."""

    def __init__(self, plan: GroupPlan, posted: torch.Tensor) -> None:
        super().__init__(plan)
        self._replicas, self._posted = plan.dp, posted

    def of_all_replicas(self, rows: torch.Tensor) -> torch.Tensor:
        return self._posted[: self._replicas * len(rows)]


class _OwnRows(AloneRows):
    """Of the attention side alone, whose rows go nowhere and come back as they are."""

    def over_width(self, partial: torch.Tensor) -> torch.Tensor:
        return partial


class _NoFFN:
    """Stands for the FFN half where the attention side runs alone."""

    def forward(self, layer: int, rows: torch.Tensor) -> torch.Tensor:
        return rows


class RankAlone:
    """Rank 0 of `plan`, which holds `held`. Exchanges take no time here. `posted` [dp * T, D] are the rows of all replicas in each
    layer, of as many rows as a part can have, and those of the FFN side where that runs alone."""

    def __init__(self, plan: GroupPlan, held: CardRank, most_rows: int) -> None:
        half = held.attention
        self.plan, self.held = plan, held
        self.posted = torch.randn(plan.dp * most_rows, half.spec.hidden_size, dtype=half.dtype, device=half.device)
        self._rows, self._own = PostedRows(plan, self.posted), _OwnRows(plan)
        self._attention_side = dataclasses.replace(held, ffn=_NoFFN())

    def whole(self, layout: CardLayout, sources: torch.Tensor) -> torch.Tensor:
        """The part of a step that :class:`serving.cuda.groups.runner.GroupRunner` launches on a rank's card: its new tokens."""
        return self.held.forward(layout, self._sources(sources), self._rows)

    def attention(self, layout: CardLayout) -> torch.Tensor:
        """All of it but FFNs and what gathers their rows: new tokens, which mean nothing."""
        return self._attention_side.forward(layout, None, self._own)

    def ffn(self, rows: int, sources: torch.Tensor, layers: Seq[int]) -> None:
        """The FFNs of `layers`, of a part of `rows` rows a replica."""
        sources, posted = self._sources(sources), self.posted[: self.plan.dp * rows]
        for layer in layers:
            self.held.ffn.forward(layer, posted if sources is None else posted.index_select(0, sources))

    def _sources(self, sources: torch.Tensor) -> torch.Tensor | None:
        """As a rank takes them: None where there is one replica."""
        return sources if self.plan.dp > 1 else None
