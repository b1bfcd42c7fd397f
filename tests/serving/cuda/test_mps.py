"""The Multi-Process Service of a system: started in a directory of its own, told to quit, and nothing left; no card is needed for
what is said to its control program."""

import os

import pytest
from served import served

from serving import registry
from serving.cuda.mps import MultiProcessService, join
from serving.errors import UserError
from serving.generate import cpu_cluster
from serving.interface import Demand

pytestmark = pytest.mark.cpu

CONTROL = """#!/bin/sh
echo "$CUDA_MPS_PIPE_DIRECTORY $CUDA_MPS_LOG_DIRECTORY $* $([ $# = 0 ] && cat)" >> "{heard}"
{then}
"""


@pytest.fixture
def control(tmp_path, monkeypatch):
    """Puts a control program on the path that notes what it is told and then does `then`."""

    def put(then="exit 0"):
        program = tmp_path / "bin" / "nvidia-cuda-mps-control"
        program.parent.mkdir()
        program.write_text(CONTROL.format(heard=tmp_path / "heard", then=then))
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
        return tmp_path / "heard"

    return put


def test_it_is_started_and_told_to_quit(control):
    heard = control()
    service = MultiProcessService()
    pipe_dir = service.pipe_dir
    assert os.path.isdir(pipe_dir)
    service.stop()
    service.stop()
    first, last = (line.split() for line in heard.read_text().splitlines())
    assert first[0] == last[0] == pipe_dir
    assert (first[2:], last[2:]) == (["-d"], ["quit"])
    assert not os.path.exists(os.path.dirname(pipe_dir))


def test_what_the_control_program_says_is_passed_on(control):
    control("echo no device; exit 3")
    with pytest.raises(UserError, match="ended with status 3: no device"):
        MultiProcessService()


def test_a_machine_without_it_is_told(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="is not on this machine"):
        MultiProcessService()


@pytest.mark.parametrize(
    "visible, seen",
    [("1", "0"), ("3, 1", "0,1"), ("GPU-4f2c,GPU-77", "GPU-4f2c,GPU-77"), ("", ""), (None, None)],
)
def test_a_client_numbers_cards_as_the_server_does(monkeypatch, visible, seen):
    """One that inherited CUDA_VISIBLE_DEVICES=1 found no card behind a server that had inherited it too."""
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", "")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible or "")
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    join("/somewhere")
    assert os.environ["CUDA_MPS_PIPE_DIRECTORY"] == "/somewhere"
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == seen


def test_it_is_of_cards(tiny_checkpoints):
    system = registry.create("elastic", {"mps": True})
    with pytest.raises(UserError, match="mps is of cuda devices"):
        system.start(system.plan(cpu_cluster(1, 256 << 20), served(tiny_checkpoints, ("mixtral",)), Demand()))
    system.stop()
