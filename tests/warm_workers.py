"""Workers without the seconds that each takes to import what all need: forked from one process that has imported it.

A worker is started as `serving.workers.process.launch` starts it, told and stopped by the same code, and runs
`serving.workers.__main__.main`; only its interpreter is not its own. The parent serves one process of the test session and ends
with it. Workers of commands that tests run are started as always.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import importlib
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

_REPOSITORY = Path(__file__).resolve().parents[1]
_LONGEST = 1 << 18  # bytes of one request: an environment, mostly
_ABOVE_ALL = 700  # file descriptors of a request go here first, so that none is overwritten before it is in its place
_STATUS = struct.Struct("i")


class Forked:
    """As much of :class:`subprocess.Popen` as a worker's host uses."""

    def __init__(self, pid: int, stdin_fd: int, status_fd: int) -> None:
        self.pid, self.stdin = pid, os.fdopen(stdin_fd, "wb")
        self._status_fd, self._code = status_fd, None

    def poll(self) -> int | None:
        return self._ended(0)

    def wait(self, timeout: float | None = None) -> int:
        code = self._ended(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(f"worker {self.pid}", timeout)
        return code

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)

    def _ended(self, timeout: float | None) -> int | None:
        if self._code is None and select.select([self._status_fd], [], [], timeout)[0]:
            (self._code,) = _STATUS.unpack(os.read(self._status_fd, _STATUS.size))
            os.close(self._status_fd)
        return self._code


class Parent:
    """The process that workers are forked from, started by its first."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Begin to import; once is enough."""
        if self._process is not None:
            return
        self._ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _LONGEST)
        with theirs:
            command = [sys.executable, __file__, str(os.getpid()), str(theirs.fileno())]
            threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # as a worker has
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env={**os.environ, **threads})

    def launch(self, inherited_fds: Sequence[int], stderr_fd: int, environment: Mapping[str, str]) -> Forked:
        """What takes the place of :func:`serving.workers.process.launch`."""
        self.start()
        stdin_read, stdin_write = os.pipe()
        status_read, status_write = os.pipe()
        request = {
            "fds": [stdin_read, 1, stderr_fd, *inherited_fds], "cores": sorted(os.sched_getaffinity(0)), "cwd": os.getcwd(),
            "environment": dict(environment),
        }  # fmt: skip
        socket.send_fds(self._ours, [json.dumps(request).encode()], [status_write, *request["fds"]])
        os.close(stdin_read)
        os.close(status_write)
        answer = self._ours.recv(64)
        if not answer:
            raise RuntimeError(f"the parent of workers ended with status {self._process.wait()}")
        return Forked(int(answer), stdin_write, status_read)

    def has_forked(self, process: psutil.Process) -> bool:
        return self._process is not None and process.ppid() == self._process.pid

    def stop(self) -> None:
        if self._process is not None:
            self._ours.close()
            self._process.wait()


PARENT = Parent()  # of all workers of this process


def _become_worker(request: Mapping, received: Sequence[int]) -> None:
    """In the child: everything as a new interpreter would find it, then what it would run."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.set_wakeup_fd(-1)
    wanted = [0, 1, 2, *request["fds"][3:]]
    moved = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _ABOVE_ALL) for fd in received]
    os.closerange(3, _ABOVE_ALL)
    for fd, number in zip(moved, wanted, strict=True):
        os.dup2(fd, number)
        os.close(fd)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    os.sched_setaffinity(0, request["cores"])
    gc.enable()
    sys.argv = ["serving.workers", str(os.getppid())]
    from serving.workers.__main__ import main

    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _reap(status_fds: dict[int, int]) -> None:
    """Tell the hosts of all workers that have ended how they did."""
    while status_fds:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        fd = status_fds.pop(pid)
        with contextlib.suppress(BrokenPipeError):  # a host that does not ask any more
            os.write(fd, _STATUS.pack(os.waitstatus_to_exitcode(status)))
        os.close(fd)


def _serve(requests: socket.socket) -> None:
    """Fork a worker for every request until there is nobody to ask."""
    if len(os.listdir("/proc/self/task")) > 1:
        raise RuntimeError("what workers import has begun threads, which a fork would lose")
    wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wake_write)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    status_fds: dict[int, int] = {}
    while True:
        ready, _, _ = select.select([requests, wake_read], [], [])
        if wake_read in ready:
            os.read(wake_read, 4096)
            _reap(status_fds)
        if requests not in ready:
            continue
        data, fds, _, _ = socket.recv_fds(requests, _LONGEST, _ABOVE_ALL)
        if not data:
            return
        status_fd, *received = fds
        pid = os.fork()
        if not pid:
            try:
                _become_worker(json.loads(data), received)
            finally:
                os._exit(1)
        status_fds[pid] = status_fd
        for fd in received:
            os.close(fd)
        requests.send(str(pid).encode())


if __name__ == "__main__":
    sys.path[:1] = [str(_REPOSITORY)]
    from serving.workers.__main__ import _die_with

    _die_with(int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.disable()
    import torch

    torch.set_num_threads(1)
    for name in ("kernels.native.code", "serving.workers.build", "serving.workers.timeline"):
        importlib.import_module(name)
    gc.freeze()
    _serve(socket.socket(fileno=int(sys.argv[2])))
