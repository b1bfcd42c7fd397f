"""The loads that systems served on one card, as their measured rows tell them: what each was asked, and on how much memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serving.errors import UserError
from serving.gpu_suite.seeded import seeded
from serving.gpu_suite.serve import pool_bytes, requests_of
from serving.interface import Request

FILES = ("serve.json", "elastic.json", "elastic_seeds.json", "mixtral.json")
# Of the runs before rows said so: their models, requests, prompts, and pools that nobody filled.
_FIRST_MODELS = ("deepseek-v2-lite", "qwen3-30b-a3b")
_FIRST_REQUESTS, _FIRST_PROMPTS, _FIRST_POOLS_GIB = 30, (64, 512), (24, 96)


@dataclass(frozen=True)
class Case:
    """One load of one system: which of :data:`serving.gpu_suite.serve.SYSTEMS`, and what it was asked. `pools_bytes` are
    CrossPool's two; the sum is what the others had. `skew` None: models drawn as the first runs did."""

    label: str
    models: tuple[str, ...]
    pools_bytes: tuple[int, int]
    rate_rps: float
    requests: int
    seed: int
    prompts: tuple[int, int]
    skew: float | None

    @property
    def load(self) -> tuple:
        """What systems have in common that served the same."""
        return (self.models, self.pools_bytes, self.rate_rps, self.requests, self.seed, self.prompts, self.skew)

    def arrivals(self) -> list[tuple[float, Request]]:
        models = seeded(self.models)
        return requests_of(models, self.rate_rps, self.requests, self.seed, self.prompts, self.skew)


@dataclass(frozen=True)
class Row:
    """One case with what was measured of it."""

    file: str
    case: Case
    measured: Mapping[str, Any]


def read_rows(folder: Path) -> list[Row]:
    """The measured rows of `folder` that are simulated here. Raises UserError where a file is no result of the suite."""
    found = []
    for name in FILES:
        path = folder / name
        if not path.exists():
            continue
        try:
            rows = json.loads(path.read_text())["rows"]
            found += [Row(name, case_of(row), row) for row in rows if "error" not in row]
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"{path} is not a result of python -m serving.gpu_suite.serve") from None
    if not found:
        raise UserError(f"{folder}: holds none of {', '.join(FILES)}")
    return found


def case_of(row: Mapping[str, Any]) -> Case:
    """What the system of a measured row was asked."""
    names = tuple(row.get("models", _FIRST_MODELS))
    rate_rps = row["rate_rps"]
    if "kv_gib" in row:
        pools = pool_bytes(seeded(names), int(row["kv_gib"] * 2**30))
        seed = 1000 * row.get("seed", 0) + int(10 * (rate_rps / len(names)))
    else:
        pools, seed = tuple(gib << 30 for gib in _FIRST_POOLS_GIB), int(rate_rps)
    return Case(
        row["system"],
        names,
        pools,
        rate_rps,
        row.get("requests", _FIRST_REQUESTS),
        seed,
        tuple(row.get("prompts", _FIRST_PROMPTS)),
        row.get("skew"),
    )
