"""README.md, ARTIFACT.md and baselines/README.md: every command in them exists, and every block runs (CROSSPOOL_SHORT)."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import hydra
import pytest
from omegaconf import OmegaConf

from paper_figures.registry import EXHIBITS
from runner.config import bench_from_dict
from runner.experiments import EXPERIMENTS, MODES
from runner.study import KINDS
from workloads.config import workload_from_dict

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("README.md", "ARTIFACT.md", "baselines/README.md")
# Read one after the other in one copy, as by whoever goes on to the next: what the first has run, the second finds done.
READINGS = (("README.md", "ARTIFACT.md"), ("baselines/README.md",))
LONGEST_READING_S = 1200  # five times what it takes beside the rest of the suite on two cores
BLOCK = re.compile(r"^```bash *\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`((?:python (?:-m|bench\.py)|\./)[^`]*)`")


HEREDOC = re.compile(r"<<'EOF'\n.*?\nEOF$", re.MULTILINE | re.DOTALL)


def blocks(document: str) -> list[str]:
    """The shell blocks of a document."""
    return BLOCK.findall((ROOT / document).read_text())


def commands() -> list[str]:
    """Our own commands, in blocks and in sentences."""
    found = []
    for document in DOCUMENTS:
        lines = [line for body in blocks(document) for line in HEREDOC.sub("", body).splitlines()]
        found += [line for line in lines if line.startswith(("python ", "./"))]
        found += INLINE.findall((ROOT / document).read_text())
    made = (
        "system=unbatched",
        "model=mine",
        "workload=evening",
        "--experiment reuse",
    )  # by the walkthroughs themselves
    found = [command for command in found if not any(word in command for word in made)]
    return sorted({" ".join(command.split()) for command in found})


def compose(arguments: list[str]) -> None:
    """Check the first cell of a `bench.py` command line."""
    first = (re.sub(r"=(\[[^]]*\]|[^\[{,]*),.*", r"=\1", argument) for argument in arguments)
    overrides = [argument for argument in first if argument != "-m"]
    if (
        importlib.util.find_spec("hydra_plugins.hydra_submitit_launcher") is None
        and "hydra/launcher=slurm" in overrides
    ):
        overrides = [word for word in overrides if not word.startswith(("hydra/launcher", "hydra.launcher"))]
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        content = OmegaConf.to_container(hydra.compose("bench", overrides), resolve=True)
    workload_from_dict(bench_from_dict(content).workload)


@pytest.mark.parametrize("command", commands())
def test_a_documented_command_exists(command):
    words = shlex.split(command)
    if words[0] == "python" and words[1] == "-m":
        assert importlib.util.find_spec(words[2]), f"no module {words[2]}"
        if words[2] == "paper_figures":
            names = [word for word in words[3:] if not word.startswith("-")]
            assert not set(names) - {
                *EXHIBITS,
                words[words.index("--experiment") + 1] if "--experiment" in words else "",
            }
    elif words[:2] == ["python", "bench.py"]:
        if "--help" not in words:
            compose(words[2:])
    else:
        script = ROOT / words[0]
        assert os.access(script, os.X_OK), f"{script} cannot be executed"
        if words[0] == "./run_all.sh" and len(words) > 1:
            assert words[1] in (*MODES, "figures", "MODE")
            names = [word for word in words[2:] if not word.startswith("-") and words[1] in MODES]
            assert {*names} <= {experiment.name for experiment in EXPERIMENTS}


CANNOT_RUN = {
    "./run_tests.sh": "is what runs this",
    "./run_all.sh fast$": "is `smoke` when shortened, which runs",
    "./run_all.sh figures$": "draws every exhibit; `figures NAME`, which runs, draws one",
    "hydra/launcher=slurm": "needs a SLURM cluster",
    "hydra/launcher=ray_cluster": "needs a Ray cluster; tests/runner/test_launchers.py has one where Ray is installed",
    "python -m crosspool.bench_": "measures for minutes",
    "python -m serving.bench_": "measures for minutes",
    "torchrun ": "tests/crosspool has two hosts of it",
    "docker ": "needs a container engine",
    "pip install": "changes the environment",
}


def can_run(command: str) -> bool:
    return not any(word in f"{command}$" for word in CANNOT_RUN)


def started(documents: Sequence[str], folder: Path) -> subprocess.Popen:
    """The blocks of `documents` from top to bottom, running in a copy of this repository whose results are its own."""
    copy = folder / "repository"
    made = {".git", ".venv", ".cache", ".hypothesis", ".pytest_cache", "checkpoints", "outputs", "local"}

    def ignored(place, names):
        """What is made at the top or below results, some of it by other tests at this moment. Compiled code comes along."""
        if Path(place).name == "__pycache__":
            return [name for name in names if not name.endswith((".pyc", ".nbi", ".nbc"))]  # half written
        return made.intersection(names) if Path(place) in (ROOT, ROOT / "results") else set()

    shutil.copytree(ROOT, copy, ignore=ignored)
    environment = {
        **os.environ, "CROSSPOOL_VENV": sys.prefix, "CROSSPOOL_SHORT": "1", "CROSSPOOL_CHECKPOINTS": str(copy / "made"),
        "WANDB_MODE": "disabled", "TMPDIR": str(folder.parent), "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }  # fmt: skip
    bodies = [body for document in documents for body in blocks(document)]
    lines = [line for body in bodies for line in body.splitlines() if can_run(line)]
    with (folder / "printed").open("w") as printed:
        return subprocess.Popen(
            ["bash", "-c", "set -ex\n" + "\n".join(lines)], cwd=copy, env=environment, stdout=printed,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    """All readings at once, since most of their time goes to starting one process after another; runs that compute
    wait for each other's cores all the same, which they lock in the folder that the copies share. By reading."""
    root = tmp_path_factory.mktemp("documents")
    scripts = {}
    for number, documents in enumerate(READINGS):
        folder = root / str(number)
        folder.mkdir()
        scripts[documents] = (started(documents, folder), folder / "printed")
    yield scripts
    for script, _ in scripts.values():
        if script.poll() is None:
            os.killpg(script.pid, signal.SIGKILL)
            script.wait()


@pytest.mark.timeout(LONGEST_READING_S + 60)
@pytest.mark.parametrize("documents", READINGS, ids="+".join)
def test_every_block_runs_from_top_to_bottom(documents, running):
    script, printed = running[documents]
    try:
        status = script.wait(timeout=LONGEST_READING_S)
    except subprocess.TimeoutExpired:
        status = f"none after {LONGEST_READING_S} s"
    assert status == 0, printed.read_text()[-6000:]


def test_every_document_is_read():
    assert [document for documents in READINGS for document in documents] == list(DOCUMENTS)


def test_the_reuse_walkthroughs_are_told_as_they_are_tested():
    told = (ROOT / "ARTIFACT.md").read_text().partition("## Reuse")[2]
    for words in ("### A model", "### A workload", "### A baseline"):
        assert words in told


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda experiment: experiment.name)
def test_an_experiment_composes_in_every_mode_and_feeds_known_exhibits(experiment):
    assert not {*experiment.figures, *experiment.figures_of} - set(EXHIBITS)
    for mode in experiment.sweeps:
        assert mode in MODES
        if experiment.studies:
            assert {study[0] for study in experiment.studies} <= set(KINDS) and experiment.cells(mode)
            continue
        compose(experiment.arguments(mode))
        cells = 1
        for argument in experiment.arguments(mode):
            cells *= len(re.sub(r"\[[^]]*\]", "list", argument.partition("=")[2]).split(","))
        assert cells == experiment.cells(mode)


def test_every_exhibit_of_the_artifact_table_is_known():
    table = (ROOT / "ARTIFACT.md").read_text().partition("## Claims")[2].partition("\nThe experiments")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
    named = {name for row in rows[2:] for name in re.findall(r"`([a-z_0-9]+)`", row[3])}
    assert named <= set(EXHIBITS)
    planned = {name for row in rows[2:] for name in re.findall(r"`([a-z0-9-]+)`", row[2])}
    assert planned <= {experiment.name for experiment in EXPERIMENTS}
