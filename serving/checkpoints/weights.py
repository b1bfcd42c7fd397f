"""What layers ask of a checkpoint, whatever it is made of: tensors by their role in the model, read when asked for."""

from __future__ import annotations

from typing import Protocol, Self

from torch import Tensor

from serving.spec import ModelSpec


class Weights(Protocol):
    """A model's tensors as stored, matrices [out, in]. A tensor is valid until the next one is asked for; copy to keep.

    `attention` has the keys input_norm, post_norm, o and, for MHA/GQA, q, k, v (q_norm, k_norm), for MLA q (or q_a,
    q_a_norm, q_b), kv_a, kv_a_norm, kv_b. `router` has gate [E, D] and, for sigmoid routing, bias [E]. `expert`, `shared`
    and `dense` are (gate [W, D], up [W, D], down [D, W]).
    """

    spec: ModelSpec

    def attention(self, layer: int) -> dict[str, Tensor]: ...

    def router(self, layer: int) -> dict[str, Tensor]: ...

    def expert(self, layer: int, index: int) -> tuple[Tensor, Tensor, Tensor]: ...

    def shared(self, layer: int) -> tuple[Tensor, Tensor, Tensor]: ...

    def dense(self, layer: int) -> tuple[Tensor, Tensor, Tensor]: ...

    def embedding(self) -> Tensor: ...

    def final_norm(self) -> Tensor: ...

    def head(self) -> Tensor:
        """The LM head [V, D]; the embedding where the two are tied."""
        ...

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exception: object) -> None: ...
