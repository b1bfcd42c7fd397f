"""Options of the static partition."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from serving.errors import UserError
from serving.options import EngineOptions

PLACEMENTS = ("equal", "searched", "given")


@dataclass(frozen=True)
class StaticOptions(EngineOptions):
    """Beside what every engine has: `placement`, which is

    - `equal`: whole models, largest first on the emptiest device, KV in equal shares;
    - `searched`: groups, co-location and replicas chosen for the true rates with the cost model of `card` (a name of
      conf/hardware; empty: `cpu2` for CPU devices, `a100-40gb` else);
    - `given`: `groups` says for each model on which devices it lies, as `{devices: [...], tp: ..., dp: ...}` or a list of
      those, one a replica. Devices are names, or positions in the cluster. Without tp and dp the model is cut so that no
      KV is copied: tensor parallel as far as its KV heads go, data-parallel attention beyond.
    """

    placement: str = "equal"
    groups: Mapping[str, Any] = field(default_factory=dict)
    card: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.placement not in PLACEMENTS:
            raise UserError(f"option placement is {self.placement!r}; known: {', '.join(PLACEMENTS)}")
        if bool(self.groups) != (self.placement == "given"):
            raise UserError("option groups says where models lie if placement is given, and only then")
