"""The models that the suite measures: published configurations in bfloat16, with seeded values for weights."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from serving.cost.table1 import published_spec
from serving.interface import ServedModel


def seeded(names: Iterable[str]) -> list[ServedModel]:
    """The published configurations of `names`. Raises UserError for one that is not known."""
    return [ServedModel(published_spec(name), Path(), "bfloat16", dummy=True) for name in names]
