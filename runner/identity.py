"""A run's identity: the hash of its resolved configuration. The same hash means the same run, done already."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any


def config_hash(content: Any) -> str:
    """First 16 hex digits of the SHA-256 of `content` as canonical JSON, in which 8 and 8.0 are one number."""
    canonical = json.dumps(_canonical(content), sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def _canonical(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _canonical(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical(child) for child in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def run_id(system: str, content: Any) -> str:
    """The name of the run's folder: the system, to be read by people, and the hash, which decides."""
    return f"{system}-{config_hash(content)}"
