"""What one rank of a group holds of a model: some of its attention heads, a slice of every FFN's width, some vocabulary.

A share is a model itself, of fewer heads and narrower FFNs, whose tensors are slices of the stored ones. So layers, KV pools
and sizes know nothing of it: they are given the share's spec and the share's view of the weights. Only sums over ranks
give the model back: attention outputs over the heads, FFN outputs over the width (Megatron-LM, section 3).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Self

from torch import Tensor

from serving.checkpoints.weights import Weights
from serving.errors import UserError
from serving.spec import GQASpec, ModelSpec


@dataclass(frozen=True)
class Slice:
    """Part `index` of `parts` equal parts."""

    index: int = 0
    parts: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.parts:
            raise UserError(f"part {self.index} of {self.parts} does not exist")

    def of(self, size: int) -> slice:
        """The part's range in an axis of `size`, which the number of parts divides."""
        width = size // self.parts
        return slice(self.index * width, (self.index + 1) * width)

    def uneven(self, size: int) -> slice:
        """The part's range where the last ones may be shorter."""
        width = -(-size // self.parts)
        return slice(min(self.index * width, size), min((self.index + 1) * width, size))


@dataclass(frozen=True)
class Share:
    """`heads`: which part of the attention heads (and of the vocabulary); `width`: which part of each FFN's width."""

    heads: Slice = Slice()
    width: Slice = Slice()

    @property
    def whole(self) -> bool:
        return self.heads.parts == 1 and self.width.parts == 1


def share_spec(spec: ModelSpec, share: Share) -> ModelSpec:
    """The spec of the rank's share. Raises :class:`UserError` where heads or widths cannot be cut evenly; KV heads are
    never copied, except that each rank of a cut MLA model keeps the latent, which all heads read."""
    attention, moe, parts = spec.attention, spec.moe, share.width.parts
    require_even_heads(spec, share.heads.parts)
    if isinstance(attention, GQASpec):
        heads, kv_heads = attention.num_heads // share.heads.parts, attention.num_kv_heads // share.heads.parts
        attention = dataclasses.replace(attention, num_heads=heads, num_kv_heads=kv_heads)
    else:
        attention = dataclasses.replace(attention, num_heads=attention.num_heads // share.heads.parts)
    require_even_width(spec, parts)
    vocabulary = share.heads.uneven(spec.vocab_size)
    return dataclasses.replace(
        spec,
        attention=attention,
        moe=dataclasses.replace(moe, expert_width=moe.expert_width // parts, shared_width=moe.shared_width // parts),
        dense_width=spec.dense_width // parts,
        vocab_size=vocabulary.stop - vocabulary.start,
    )


def require_even_heads(spec: ModelSpec, parts: int) -> None:
    """Raises :class:`UserError` unless `parts` ranks get equally many attention heads and, for GQA, whole KV heads."""
    attention = spec.attention
    if attention.num_heads % parts:
        raise UserError(f"{spec.name}: {attention.num_heads} attention heads cannot be cut into {parts} equal parts")
    if isinstance(attention, GQASpec) and attention.num_kv_heads % parts:
        raise UserError(
            f"{spec.name}: {attention.num_kv_heads} KV heads cannot be cut into {parts} parts without copies; "
            "use data-parallel attention for the rest"
        )


def require_even_width(spec: ModelSpec, parts: int) -> None:
    """Raises :class:`UserError` unless every FFN width of the model is a multiple of `parts`."""
    widths = {"expert": spec.moe.expert_width, "shared expert": spec.moe.shared_width, "dense": spec.dense_width}
    for what, width in widths.items():
        if width % parts:
            raise UserError(f"{spec.name}: {what} width {width} cannot be cut into {parts} equal parts")


class ShareOfWeights:
    """The share's view of stored weights: every tensor is a slice, and only what is sliced is read by who copies it."""

    def __init__(self, weights: Weights, share: Share) -> None:
        self._weights, self._share, self._full = weights, share, weights.spec
        self.spec = share_spec(weights.spec, share)

    def attention(self, layer: int) -> dict[str, Tensor]:
        """Rows of what makes heads, columns of what joins them; norms and latents are whole."""
        part, stored = self._share.heads, self._weights.attention(layer)
        for role in ("q", "q_b", "kv_b") + (("k", "v") if isinstance(self._full.attention, GQASpec) else ()):
            if role in stored:
                stored[role] = stored[role][part.of(stored[role].shape[0])]
        stored["o"] = stored["o"][:, part.of(stored["o"].shape[1])]
        return stored

    def router(self, layer: int) -> dict[str, Tensor]:
        return self._weights.router(layer)

    def expert(self, layer: int, index: int) -> tuple[Tensor, Tensor, Tensor]:
        return self._ffn(self._weights.expert(layer, index))

    def shared(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        return self._ffn(self._weights.shared(layer))

    def dense(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        return self._ffn(self._weights.dense(layer))

    def _ffn(self, tensors: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        gate, up, down = tensors
        part = self._share.width.of(gate.shape[0])
        return gate[part], up[part], down[:, part]

    def embedding(self) -> Tensor:
        return self._weights.embedding()[self._share.heads.uneven(self._full.vocab_size)]

    def final_norm(self) -> Tensor:
        return self._weights.final_norm()

    def head(self) -> Tensor:
        return self._weights.head()[self._share.heads.uneven(self._full.vocab_size)]

    def close(self) -> None:
        self._weights.close()

    def __enter__(self) -> Self:
        self._weights.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._weights.__exit__(*exception)
