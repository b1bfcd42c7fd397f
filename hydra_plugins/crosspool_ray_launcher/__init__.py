"""Hydra launcher `ray_cluster`: the cells of a sweep as tasks of a Ray cluster, local or there already.

The launcher that Hydra's authors publish asks for a cloudpickle older than joblib's and cannot join a running cluster with
its defaults, so this is one of ours. A cell travels as plain data. Every node needs this repository at the same path, and a
results directory that all share. A cell takes as many CPUs of one node as it has CPU devices, so cells never share a core.

Hydra accepts launchers from packages below `hydra_plugins` only, and imports each at every start: Ray is imported late.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf


class RayLauncher(Launcher):
    """`address`: `local` starts a cluster of this machine alone, `auto` or `host:port` joins one. `cpus_per_cell`: CPUs of
    a node that a cell takes; 0 is one a CPU device where the backend computes, one where it simulates."""

    def __init__(self, address: str = "local", cpus_per_cell: float = 0) -> None:
        self._address = address
        self._cpus_per_cell = cpus_per_cell
        self._config: DictConfig | None = None
        self._hydra: HydraContext | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self._config, self._hydra = config, hydra_context

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run every cell and wait for all. A cell whose node or process dies is logged as failed, as any other."""
        from runner import ray_cells

        cells = [self._cell(list(overrides)) for overrides in job_overrides]
        ray_cells.run(cells, self._address)
        return [JobReturn(overrides=cell.overrides, status=JobStatus.COMPLETED) for cell in cells]

    def _cell(self, overrides: list[str]) -> Any:
        from runner.ray_cells import Cell

        config = self._hydra.config_loader.load_sweep_config(self._config, overrides)
        chosen = list(config.hydra.overrides.task)
        environment = OmegaConf.to_container(config.hydra.job.env_set, resolve=True)
        plain = OmegaConf.masked_copy(config, [key for key in config if key != "hydra"])
        content = OmegaConf.to_container(plain, resolve=True)
        return Cell(content, chosen, environment, self._cpus_per_cell or _cpus(content))


def _cpus(content: Mapping[str, Any]) -> float:
    """CPUs of a node that the cell keeps busy: its devices where they compute, else the simulator's one."""
    if content["backend"]["name"] != "real":
        return 1
    return max(1, sum(device.get("kind", "cpu") == "cpu" for device in content["devices"]))
