"""CUDA's Multi-Process Service for the engines of one system: kernels of its clients may run on a card at once, where processes
otherwise take turns on it. A server of our own, in a directory of its own, so that nobody else's is used or stopped."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from serving.errors import UserError

_PIPE_VARIABLE, _VISIBLE_VARIABLE = "CUDA_MPS_PIPE_DIRECTORY", "CUDA_VISIBLE_DEVICES"
_CONTROL = "nvidia-cuda-mps-control"
_TIMEOUT_S = 30.0


def join(pipe_dir: str) -> None:
    """Make this process, whose driver has not started, a client of the service at `pipe_dir`. The server numbers the cards that
    were visible to it from 0 (NVIDIA's MPS documentation, on CUDA_VISIBLE_DEVICES), so a client that has inherited their numbers
    would look for cards that are not there; those that are named by UUID keep their names."""
    os.environ[_PIPE_VARIABLE] = pipe_dir
    visible = [card.strip() for card in os.environ.get(_VISIBLE_VARIABLE, "").split(",")]
    if all(card.isdigit() for card in visible):
        os.environ[_VISIBLE_VARIABLE] = ",".join(map(str, range(len(visible))))


class MultiProcessService:
    """Runs from construction to `stop`; processes that :func:`join` it at `pipe_dir` are its clients."""

    def __init__(self) -> None:
        """Raises UserError where the control program is missing or does not start."""
        if shutil.which(_CONTROL) is None:
            raise UserError(f"option mps wants {_CONTROL}, which is not on this machine (python -m serving.doctor)")
        self._root = Path(tempfile.mkdtemp(prefix="crosspool-mps-"))
        for name in ("pipe", "log"):
            (self._root / name).mkdir()
        self.pipe_dir = str(self._root / "pipe")
        try:
            self._control(["-d"], "")
        except BaseException:
            shutil.rmtree(self._root, ignore_errors=True)
            raise

    def _control(self, arguments: list[str], commands: str) -> None:
        environment = {**os.environ, _PIPE_VARIABLE: self.pipe_dir, "CUDA_MPS_LOG_DIRECTORY": str(self._root / "log")}
        # Its output goes to a file: a daemon would hold a pipe open, and its caller with it.
        with (self._root / "output").open("w+") as output:
            done = subprocess.run(
                [_CONTROL, *arguments], input=commands, text=True, env=environment, stdout=output, stderr=output,
                timeout=_TIMEOUT_S, check=False,
            )  # fmt: skip
            output.seek(0)
            said = output.read().strip()
        if done.returncode:
            raise UserError(f"{_CONTROL} ended with status {done.returncode}: {said or 'no word'}")

    def stop(self) -> None:
        """Its clients have ended. Safe to call twice."""
        if self._root.exists():
            try:
                self._control([], "quit\n")
            finally:
                shutil.rmtree(self._root, ignore_errors=True)
