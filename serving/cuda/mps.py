"""CUDA's Multi-Process Service for the engines of one system: kernels of its clients may run on a card at once, where processes
otherwise take turns on it. A server of our own, in a directory of its own, so that nobody else's is used or stopped."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from serving.errors import UserError

PIPE_VARIABLE = "CUDA_MPS_PIPE_DIRECTORY"
_CONTROL = "nvidia-cuda-mps-control"
_TIMEOUT_S = 30.0


class MultiProcessService:
    """Runs from construction to `stop`; processes with `pipe_dir` in PIPE_VARIABLE before their driver starts are its clients."""

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
        environment = {**os.environ, PIPE_VARIABLE: self.pipe_dir, "CUDA_MPS_LOG_DIRECTORY": str(self._root / "log")}
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
