"""Block sizes found by `python -m kernels.bench --tune`, kept one file a card in `kernels/tuned/`, with defaults beside.

A launch asks for its configuration by operator and key; a card that was never tuned gets the caller's default, so tuning
changes speed and nothing else.
"""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

import torch

TUNED_DIRECTORY = Path(__file__).parent / "tuned"


def card_name(device: torch.device) -> str:
    """The card's name as a file name: `nvidia_h200`; `none` off CUDA."""
    if device.type != "cuda":
        return "none"
    return re.sub(r"[^a-z0-9]+", "_", torch.cuda.get_device_name(device).lower()).strip("_")


@functools.cache
def _table(device: torch.device) -> dict[str, dict[str, int]]:
    try:
        return json.loads((TUNED_DIRECTORY / f"{card_name(device)}.json").read_text())
    except FileNotFoundError:
        return {}


_overrides: dict[str, dict[str, int]] = {}
_last_keys: dict[str, str] = {}


def take_last_key(operator: str) -> str | None:
    """The key under which `operator` last asked for its configuration since this was last called, if it did."""
    return _last_keys.pop(operator, None)


def set_override(operator: str, config: dict[str, int] | None) -> None:
    """Make every launch of `operator` use `config` (None: no more); what the tuner turns."""
    if config is None:
        _overrides.pop(operator, None)
    else:
        _overrides[operator] = config


def known(operator: str, key: str, device: torch.device) -> dict[str, int]:
    """What was found for `operator` under a key, as :func:`take_last_key` gives it, on a card such as `device`."""
    return _table(device).get(f"{operator}/{key}", {})


def config(operator: str, key: str, like: torch.Tensor, default: dict[str, int]) -> dict[str, int]:
    """Block sizes of `operator` for the shape class `key` in the dtype and on the device of `like`: tuned where known,
    `default` elsewhere."""
    key = f"{str(like.dtype).removeprefix('torch.')}_{key}"
    _last_keys[operator] = key
    if operator in _overrides:
        return {**default, **_overrides[operator]}
    return {**default, **known(operator, key, like.device)}


def save(device: torch.device, found: dict[str, dict[str, int]], directory: Path = TUNED_DIRECTORY) -> Path:
    """Merge `found` ("operator/key" -> configuration) into the card's file; returns its path."""
    path = directory / f"{card_name(device)}.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    directory.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**before, **found}, indent=1, sort_keys=True) + "\n")
    _table.cache_clear()
    return path
