"""A parallelism plan per model that exposes KV: how much of a pool's KV capacity one request can use (paper, Fig. 2).

Tensor parallelism splits KV by heads. With more ranks than KV heads each head's KV is stored several times, data
parallelism instead gives each replica its own requests; either way a request sees less than the whole pool. What
differs is the total: copies of KV waste it, data parallelism does not, so the plan is tensor parallel as far as KV
heads go and data parallel beyond."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from serving.errors import UserError
from serving.spec import MLASpec, ModelSpec


@dataclass(frozen=True)
class ParallelPlan:
    """Attention of one model over `tensor * data` devices; `copies` is how often each KV head is stored in a
    replica."""

    tensor: int
    data: int
    copies: int = 1

    @property
    def devices(self) -> int:
        return self.tensor * self.data

    @property
    def request_share(self) -> Fraction:
        """Share of all KV memory that one request can fill with KV of its own."""
        return Fraction(1, self.data * self.copies)

    @property
    def total_share(self) -> Fraction:
        """Share of all KV memory that holds distinct KV."""
        return Fraction(1, self.copies)

    @property
    def weight_copies(self) -> int:
        """How often the attention weights are stored: once a replica."""
        return self.data

    def __str__(self) -> str:
        parts = [f"{name}{degree}" for name, degree in (("TP", self.tensor), ("DP", self.data)) if degree > 1]
        return " x ".join(parts) or "one device"


def kv_heads(spec: ModelSpec) -> int:
    """KV heads that tensor parallelism can split; MLA's latent is one for all heads."""
    return 1 if isinstance(spec.attention, MLASpec) else spec.attention.num_kv_heads


def plans(num_kv_heads: int, devices: int) -> list[ParallelPlan]:
    """Every TP x DP plan over `devices` in which ranks hold whole heads, or heads are copied evenly."""
    if num_kv_heads < 1 or devices < 1:
        raise UserError(f"{num_kv_heads} KV heads on {devices} devices; both are at least 1")
    found = []
    for tensor in (d for d in range(1, devices + 1) if devices % d == 0):
        if num_kv_heads % tensor == 0:
            found.append(ParallelPlan(tensor, devices // tensor))
        elif tensor % num_kv_heads == 0:
            found.append(ParallelPlan(tensor, devices // tensor, copies=tensor // num_kv_heads))
    return found


def best_plan(num_kv_heads: int, devices: int) -> ParallelPlan:
    """The plan that exposes most: first to one request, then in total, then with fewest copies of the weights.

    Equals TP over gcd(KV heads, devices) and DP over the rest whenever copying heads gains a request nothing.
    """
    return max(plans(num_kv_heads, devices), key=lambda p: (p.request_share, p.total_share, -p.weight_copies))
