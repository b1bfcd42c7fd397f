"""What a system goes by: a setting may make of it a system of its own to a reader, in figures and in claims alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Settings of a system that are systems of their own to a reader: (system, option, value) -> what their name ends in. They
# are those of the presets in conf/system, which the record does not name.
_ENDINGS = {
    ("crosspool", "lanes_of_model", 1): "one-batch",
    ("static", "placement", "searched"): "searched",
    ("elastic", "mps", True): "mps",
    ("swap", "mode", "token"): "token",
    ("swap", "zero_cost", True): "zero-cost",
    **{(system, "admission", "cap"): "cap" for system in ("elastic", "elastic-placement", "quota")},
}


def named(system: str, options: Mapping[str, Any]) -> str:
    """The name that `system` goes by with these options: `swap-token` for swap in its token mode."""
    endings = [word for (name, key, value), word in _ENDINGS.items() if name == system and options.get(key) == value]
    return "-".join([system, *endings])
