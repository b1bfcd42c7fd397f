"""Cells of a sweep as Ray tasks: what the Hydra launcher `ray_cluster` calls. Needs the optional package `ray`."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner import sweep
from serving.errors import UserError, one_line

_REPOSITORY = Path(__file__).resolve().parents[1]
_INTERRUPT_GRACE_S = 30.0
_ANSWER_S = 10.0


@dataclass(frozen=True)
class Cell:
    """One configuration as plain data, the overrides that chose it, the environment that its process wants, and the CPUs of
    one node that it takes."""

    content: dict[str, Any]
    overrides: list[str]
    environment: dict[str, str]
    cpus: float


def run(cells: Sequence[Cell], address: str) -> None:
    """Run `cells` on the cluster at `address` (`local`: a new one of this machine) and wait until each has been logged.
    Raises UserError where Ray is missing or the cluster cannot be reached; KeyboardInterrupt after cells were told to stop."""
    ray = _connected(address)
    started = not address or address == "local"
    try:
        os.environ.update(cells[0].environment if cells else {})
        largest = max((node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]), default=0)
        remote = ray.remote(max_retries=1)(_run)
        tasks = {}
        for cell in cells:
            if cell.cpus > largest:
                sweep.log_lost(
                    cell.content, cell.overrides, f"wants {cell.cpus:g} CPUs, no node has more than {largest:g}"
                )
            else:
                tasks[remote.options(num_cpus=cell.cpus).remote(cell.content, cell.overrides, cell.environment)] = cell
        _wait(ray, tasks)
    finally:
        if started:
            ray.shutdown()


def _connected(address: str) -> Any:
    """The module `ray`, connected."""
    try:
        import ray
    except ImportError:
        raise UserError(
            "hydra/launcher=ray_cluster needs Ray: python -m pip install 'ray[default]' -c constraints.txt"
        ) from None
    _require_answer(address)
    # Workers import this repository from its place, which every node has.
    environment = {"env_vars": {"PYTHONPATH": os.pathsep.join([str(_REPOSITORY), os.environ.get("PYTHONPATH", "")])}}
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        local = {"include_dashboard": False} if address == "local" else {}
        ray.init(address=address, runtime_env=environment, ignore_reinit_error=True, logging_level="ERROR", **local)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UserError(f"no Ray cluster at {address!r}: {one_line(error)}") from None
    return ray


def _require_answer(address: str) -> None:
    """Raises UserError unless something listens at `host:port`: Ray itself asks again for minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "/" in host:
        return
    try:
        socket.create_connection((host, int(port)), timeout=_ANSWER_S).close()
    except OSError as error:
        raise UserError(f"no Ray cluster at {address!r}: {error.strerror or error}") from None


def _run(content: dict[str, Any], overrides: list[str], environment: dict[str, str]) -> None:
    """What a node does for one cell."""
    os.environ.update(environment)
    sweep.run_cell(content, overrides)


def _wait(ray: Any, tasks: dict[Any, Cell]) -> None:
    try:
        for task, cell in tasks.items():
            try:
                ray.get(task)
            except ray.exceptions.RayError as error:
                sweep.log_lost(cell.content, cell.overrides, one_line(f"{type(error).__name__}: {error}"))
    except KeyboardInterrupt:
        for task in tasks:
            ray.cancel(task)  # an interrupt inside the cell, which keeps what it has seen
        ray.wait(list(tasks), num_returns=len(tasks), timeout=_INTERRUPT_GRACE_S)
        raise
