"""Set-up: the pins fit the bounds, a complete environment needs no network, and errors are one line."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).resolve().parents[1]


def environment(*arguments: str) -> list[str]:
    command = [sys.executable, str(ROOT / "scripts" / "environment.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def source_setup(**variables: str) -> subprocess.CompletedProcess:
    """Source the set-up as run_all.sh does, from another directory, and print which Python it left."""
    kept = {key: value for key, value in os.environ.items() if key not in ("VIRTUAL_ENV", "CROSSPOOL_VENV")}
    script = f". {ROOT}/scripts/setup_env.sh && python -c 'import sys; print(sys.prefix)'"
    return subprocess.run(
        ["bash", "-uc", script], cwd="/", env={**kept, **variables}, capture_output=True, text=True, timeout=120, check=False
    )  # fmt: skip


def test_every_requirement_is_pinned_within_its_bounds():
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    for line in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]:
        requirement = Requirement(line)
        assert pins[canonicalize_name(requirement.name)] in requirement.specifier, line


def test_this_environment_lacks_nothing_and_its_torch_is_held():
    assert environment("missing") == []
    for own in ([], ["--own"]):
        held = environment("constraints", *own)
        assert f"torch=={metadata.version('torch')}" in held
    assert environment("pin", "torch")[0].startswith("torch==")


def test_a_complete_environment_is_used_as_it_is_without_a_network():
    done = source_setup(CROSSPOOL_VENV=sys.prefix, PIP_NO_INDEX="1", PIP_FIND_LINKS="")
    assert (done.returncode, done.stderr) == (0, "")
    assert Path(done.stdout.strip()).resolve() == Path(sys.prefix).resolve()


def test_no_suitable_python_is_one_clear_line(tmp_path):
    done = source_setup(CROSSPOOL_VENV=str(tmp_path / "venv"), CROSSPOOL_PYTHON="false")
    assert done.returncode != 0
    assert done.stderr.startswith("error: no Python 3.11 or 3.12 found (tried false)")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "venv").exists()


def test_an_installation_that_fails_is_one_clear_line(tmp_path):
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    nothing = tmp_path / "pip.conf"
    nothing.touch()
    done = source_setup(
        CROSSPOOL_VENV=str(tmp_path / "venv"), PIP_NO_INDEX="1", PIP_FIND_LINKS="", PIP_CONFIG_FILE=str(nothing)
    )
    assert done.returncode != 0
    assert done.stderr.startswith("error: pip failed: ERROR: ")
    assert done.stderr.count("\n") == 1
