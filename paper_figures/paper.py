"""The paper's numbers, from the one file that holds them."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import yaml


@cache
def paper() -> dict[str, Any]:
    """paper.yaml, parsed."""
    return yaml.safe_load(Path(__file__).with_name("paper.yaml").read_text())


def facts(name: str) -> Any:
    return paper()["facts"][name]
