"""A command told to stop: its child ends first, with time to write what it has."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu

REPOSITORY = Path(__file__).resolve().parents[2]
CHILD = """
import pathlib, signal, time
def stop(*_): raise KeyboardInterrupt
signal.signal(signal.SIGINT, stop); signal.signal(signal.SIGTERM, stop)
try:
    pathlib.Path("begun").write_text("")
    time.sleep(60)
except KeyboardInterrupt:
    time.sleep(1)  # longer than subprocess.run would wait
    pathlib.Path("kept").write_text("")
    raise SystemExit(130)
"""
PARENT = """
import sys
from pathlib import Path
from runner.children import run_child
try:
    raise SystemExit(run_child(["child.py"], Path.cwd()))
except KeyboardInterrupt:
    print("interrupted")
    raise SystemExit(130)
"""


@pytest.mark.parametrize("told", ["terminated", "interrupted"])
def test_a_child_keeps_what_it_has_before_its_parent_ends(told, tmp_path):
    (tmp_path / "child.py").write_text(CHILD)
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509
    )
    deadline = time.monotonic() + 30
    while not (tmp_path / "begun").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.1)
    if told == "terminated":
        parent.terminate()  # the parent alone, as a batch system does it
    else:
        os.killpg(parent.pid, signal.SIGINT)  # both, as a terminal does it
    printed, _ = parent.communicate(timeout=30)
    assert parent.returncode == 130 and "interrupted" in printed
    assert (tmp_path / "kept").exists()


def test_the_status_of_a_child_is_handed_on(tmp_path):
    (tmp_path / "child.py").write_text("raise SystemExit(7)")
    done = subprocess.run(
        [sys.executable, "-c", PARENT],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        timeout=30,
        check=False,
    )
    assert done.returncode == 7
