"""A group: one model on several devices, in lockstep. Pure description, the same for both backends.

Attention of a group of n = tp * dp ranks is `dp` replicas of `tp` ranks each. A replica holds sequences of its own, and its
ranks share out its heads; the FFN is cut by width over all n ranks and computes the rows of every replica at once. With as
many tensor-parallel ranks as there are KV heads no KV is stored twice; models with fewer KV heads than devices (MLA has one
latent) take data-parallel attention for the rest (the paper's Fig. 2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from serving.errors import UserError
from serving.parallel.share import Share, Slice, require_even_heads, require_even_width
from serving.spec import GQASpec, ModelSpec


@dataclass(frozen=True)
class GroupPlan:
    """`devices` by rank, as names; ranks of one replica are neighbours."""

    devices: tuple[str, ...]
    tp: int = 1
    dp: int = 1

    def __post_init__(self) -> None:
        if len(set(self.devices)) < len(self.devices):
            raise UserError(f"a group's devices must differ, got {', '.join(self.devices)}")
        if self.tp < 1 or self.dp < 1 or self.tp * self.dp != len(self.devices):
            raise UserError(
                f"attention tp {self.tp} x dp {self.dp} does not fill the {len(self.devices)} devices "
                f"{', '.join(self.devices)}"
            )

    @property
    def ranks(self) -> int:
        return len(self.devices)

    def replica_of(self, rank: int) -> int:
        return rank // self.tp

    def ranks_of(self, replica: int) -> range:
        return range(replica * self.tp, (replica + 1) * self.tp)

    def share(self, rank: int) -> Share:
        """What `rank` holds."""
        return Share(heads=Slice(rank % self.tp, self.tp), width=Slice(rank, self.ranks))

    def __str__(self) -> str:
        return f"tp{self.tp} x dp{self.dp} on {', '.join(self.devices)}"


def natural_group(spec: ModelSpec, devices: tuple[str, ...]) -> GroupPlan:
    """The group that copies no KV: tensor parallel as far as the KV heads go, data parallel beyond; MLA data parallel.

    Raises :class:`UserError` where the model cannot be cut into that many shares."""
    kv_heads = spec.attention.num_kv_heads if isinstance(spec.attention, GQASpec) else 1
    tp = math.gcd(kv_heads, len(devices))
    require_even_heads(spec, tp)
    require_even_width(spec, len(devices))
    return GroupPlan(devices, tp, len(devices) // tp)
