"""Sweeps on a cluster: SLURM's launcher with its local executor, and Ray with several nodes, each run for real."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import hydra
import pytest

from runner.records import read_records

pytestmark = pytest.mark.cpu

REPOSITORY = Path(__file__).resolve().parents[2]
NEEDS_SUBMITIT = pytest.mark.skipif(
    importlib.util.find_spec("hydra_plugins.hydra_submitit_launcher") is None,
    reason="needs the optional package hydra-submitit-launcher",
)
NEEDS_RAY = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the optional package ray")
SWEEP = [
    "-m",
    "system=crosspool,static",
    "workload.seeds.schedule=0,1",
    "tracking=disabled",
    "workload.duration_s=1",
    "workload.rate=4",
    "workload.lengths.prompt_max=20",
    "workload.lengths.output_min=2",
    "workload.lengths.output_max=5",
]


def bench(tmp_path, *arguments):
    environment = {**os.environ, "TMPDIR": str(tmp_path), "CROSSPOOL_CHECKPOINTS": str(tmp_path / "checkpoints")}
    return subprocess.run(
        [sys.executable, "bench.py", *SWEEP, *arguments, f"results_dir={tmp_path}/results"],
        cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip


def assert_four_complete(done, tmp_path):
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 of 4 cells done, 0 failed" in done.stdout
    found, skipped = read_records(tmp_path / "results")
    assert [record.status for record in found] == ["complete"] * 4 and not skipped


@NEEDS_SUBMITIT
def test_submitit_runs_a_sweep_of_the_real_backend_as_jobs_of_their_own(tmp_path):
    done = bench(tmp_path, "hydra/launcher=submitit_local", f"hydra.sweep.dir={tmp_path}/notes")
    assert_four_complete(done, tmp_path)
    assert len(list((tmp_path / "notes" / ".submitit").glob("*/*_result.pkl"))) == 4


@NEEDS_SUBMITIT
def test_the_slurm_preset_composes_and_a_machine_without_slurm_is_one_line(tmp_path):
    with hydra.initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
        launcher = hydra.compose("bench", ["hydra/launcher=slurm"], return_hydra_config=True).hydra.launcher
    assert launcher.cpus_per_task == 3 and launcher._target_.endswith("SlurmLauncher")
    done = bench(tmp_path, "hydra/launcher=slurm", "backend=sim", f"hydra.sweep.dir={tmp_path}/notes")
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: the launcher lost a cell: ")


@pytest.fixture(scope="module")
def cluster():
    """A head that has too few CPUs for a cell, and two nodes that have enough."""
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    for _ in range(2):
        nodes.add_node(num_cpus=2)
    nodes.wait_for_nodes()
    yield nodes.address
    nodes.shutdown()


@NEEDS_RAY
def test_ray_runs_a_sweep_on_the_nodes_that_have_room(tmp_path, cluster):
    ray = ["hydra/launcher=ray_cluster", f"hydra.launcher.address={cluster}", "backend=sim"]
    done = bench(tmp_path, *ray, "hydra.launcher.cpus_per_cell=2")
    assert_four_complete(done, tmp_path)
    again = bench(tmp_path, *ray)
    assert again.returncode == 0 and again.stdout.count("done already") == 4
    too_much = bench(tmp_path, *ray, "hydra.launcher.cpus_per_cell=3")
    assert too_much.returncode == 2 and "wants 3 CPUs, no node has more than 2" in too_much.stderr
    assert "0 of 4 cells done, 4 failed" in too_much.stdout


@NEEDS_RAY
def test_ray_runs_the_real_backend_on_a_node(tmp_path, cluster):
    done = bench(tmp_path, "hydra/launcher=ray_cluster", f"hydra.launcher.address={cluster}")
    assert_four_complete(done, tmp_path)


@NEEDS_RAY
def test_a_cluster_that_is_not_there_is_one_clear_line(tmp_path):
    done = bench(tmp_path, "hydra/launcher=ray_cluster", "hydra.launcher.address=127.0.0.1:1", "backend=sim")
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: no Ray cluster at '127.0.0.1:1'")


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="Ray is installed")
def test_ray_without_the_package_says_what_to_install(tmp_path):
    done = bench(tmp_path, "hydra/launcher=ray_cluster", "backend=sim")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: hydra/launcher=ray_cluster needs Ray: python -m pip install")


@pytest.mark.skipif(
    importlib.util.find_spec("hydra_plugins.hydra_submitit_launcher") is not None, reason="the launcher is installed"
)
@pytest.mark.parametrize("launcher", ["slurm", "submitit_local"])
def test_slurm_without_the_package_says_what_to_install(tmp_path, launcher):
    done = bench(tmp_path, f"hydra/launcher={launcher}", "backend=sim")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: SLURM's launcher needs an optional package: python -m pip")
