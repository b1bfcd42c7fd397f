"""Sizes that follow from a published model's shape alone: parameters of its halves, KV bytes a token, parallel plans."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from paper_figures.paper import paper

BF16_BYTES = 2


@dataclass(frozen=True)
class Shape:
    """One model of paper.yaml's `models`. Elements are weights; a gated FFN of width w on hidden h has 3 h w of them."""

    name: str
    fields: Mapping[str, Any]

    @property
    def layers(self) -> int:
        return self.fields["layers"]

    @property
    def attention_elements(self) -> int:
        """Projections of all layers' attention."""
        f = self.fields
        if f["attention"] == "gqa":
            per_layer = f["hidden"] * f["head_dim"] * (2 * f["heads"] + 2 * f["kv_heads"])
        else:
            query = f["heads"] * (f["nope"] + f["rope"])
            q_elements = f["q_rank"] * (f["hidden"] + query) if f["q_rank"] else f["hidden"] * query
            latent = f["hidden"] * (f["kv_rank"] + f["rope"])
            expand = f["kv_rank"] * f["heads"] * (f["nope"] + f["value"])
            per_layer = q_elements + latent + expand + f["heads"] * f["value"] * f["hidden"]
        return self.layers * per_layer

    @property
    def ffn_elements(self) -> int:
        """Experts, shared experts, routers and dense layers."""
        f = self.fields
        routed = 3 * f["hidden"] * (f["experts"] * f["expert"] + f["shared"]) + f["hidden"] * f["experts"]
        return (self.layers - f["first_dense"]) * routed + f["first_dense"] * 3 * f["hidden"] * f["dense"]

    @property
    def embedding_elements(self) -> int:
        """Embedding and LM head, which none of these models ties."""
        return 2 * self.fields["vocab"] * self.fields["hidden"]

    @property
    def ffn_share(self) -> float:
        """Of all parameters, embeddings included: this is the share that the paper's Table 1 gives."""
        return self.ffn_elements / (self.ffn_elements + self.attention_elements + self.embedding_elements)

    @property
    def kv_bytes_per_token(self) -> int:
        """In BF16, over all layers: K and V of every KV head, or MLA's one latent."""
        f = self.fields
        elements = f["kv_rank"] + f["rope"] if f["attention"] == "mla" else 2 * f["kv_heads"] * f["head_dim"]
        return self.layers * elements * BF16_BYTES


def shapes() -> dict[str, Shape]:
    return {name: Shape(name, fields) for name, fields in paper()["models"].items()}


def kv_share(kv_heads: int, gpus: int) -> float:
    """Share of the KV capacity of `gpus` GPUs that one request can use when attention is split by KV heads as far as they
    go and replicated by data parallelism beyond: gcd(kv_heads, gpus) / gpus (paper, Fig. 2)."""
    return math.gcd(kv_heads, gpus) / gpus
