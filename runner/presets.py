"""A run as presets describe it, for commands other than bench.py."""

from __future__ import annotations

from pathlib import Path

import hydra
from omegaconf import OmegaConf

from runner.config import BenchConfig, bench_from_dict

CONFIGURATION = Path(__file__).resolve().parents[1] / "conf"


def composed(*overrides: str) -> BenchConfig:
    """What `python bench.py OVERRIDES` would run. Raises UserError where it would refuse to."""
    with hydra.initialize_config_dir(str(CONFIGURATION), version_base="1.3"):
        content = hydra.compose("bench", list(overrides))
    return bench_from_dict(OmegaConf.to_container(content, resolve=True))
