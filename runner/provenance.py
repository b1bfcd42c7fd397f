"""Where a number comes from: the code, the packages and the machine, as every record states them."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from serving.memory.host import huge_pages

_PACKAGES = ("torch", "triton", "transformers", "datasets", "hydra-core", "wandb", "numpy", "pyarrow", "pandas")
_REPOSITORY = Path(__file__).resolve().parents[1]


def provenance() -> dict[str, Any]:
    """Git revision and dirty flag, package versions, CPU, GPUs and driver. Never fails: what cannot be told is None."""
    return {"git": _git(), "packages": _packages(), "python": platform.python_version(), "hardware": _hardware()}


def _git() -> dict[str, Any]:
    told = os.environ.get(
        "CROSSPOOL_REVISION"
    )  # of a copy that runs without its history, on a machine that is only lent
    if told:
        return {"revision": told, "dirty": None}
    revision = _output("git", "rev-parse", "HEAD")
    status = _output("git", "status", "--porcelain", "--untracked-files=no")
    return {"revision": revision, "dirty": bool(status) if status is not None else None}


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=_REPOSITORY, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _packages() -> dict[str, str | None]:
    versions: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def _hardware() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    gpus = _output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    return {
        "machine": platform.machine(),
        "cpu": names[0] if names else None,
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "kernel": platform.release(),
        "huge_pages": huge_pages(),
        "gpus": gpus.splitlines() if gpus else [],
    }
