"""A worker as its host sees it: a child process, the rings to and from it, and what it said last."""

from __future__ import annotations

import json
import os
import pickle
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from serving.errors import UserError, WorkerDied
from serving.shm.bell import Bell
from serving.shm.region import SharedRegion
from serving.shm.ring import BelledRing, Ring
from serving.workers import counters
from serving.workers.config import Channel, MailboxRef, RegionRef, Role, WorkerConfig
from serving.workers.counters import Counters
from serving.workers.messages import Cancel, PoolUse, Stop, Submit, Tokens, decode, encode

_RING_BYTES = 4 << 20
_REPOSITORY = Path(__file__).resolve().parents[2]
_STOP_GRACE_S = 5.0


def ref(region: SharedRegion) -> RegionRef:
    return RegionRef(region.fd, region.size_bytes)


def descriptors(mailboxes: Sequence[MailboxRef]) -> list[int]:
    """The file descriptors that a process needs to take part in `mailboxes`."""
    fds = [mailbox.region.fd for mailbox in mailboxes]
    for mailbox in mailboxes:
        if mailbox.bells is not None:
            fds += [fd for bell in mailbox.bells.doorbells for fd in (bell.read_fd, bell.write_fd)]
    return fds


def launch(inherited_fds: Sequence[int], stderr_fd: int, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """An interpreter of its own that becomes a worker once it is told its configuration on its standard input."""
    return subprocess.Popen(
        [sys.executable, "-m", "serving.workers", str(os.getpid())],
        stdin=subprocess.PIPE,
        stderr=stderr_fd,
        pass_fds=inherited_fds,
        env=environment,
    )


class WorkerProcess:
    """Starts a worker for `role` on `core` (None: any) and talks to it. It inherits `inherited_fds` (mailboxes, doorbells)
    and, where `timeline` names a file, leaves its timeline there when it stops."""

    def __init__(
        self,
        name: str,
        core: int | None,
        role: Role,
        inherited_fds: Sequence[int] = (),
        timeline: Path | None = None,
    ) -> None:
        self.name = name
        self._regions = [SharedRegion(_RING_BYTES), SharedRegion(_RING_BYTES), SharedRegion(counters.REGION_BYTES)]
        self._bell = Bell()
        self._control, self._tokens = BelledRing(self._regions[0], self._bell), Ring(self._regions[1])
        self.counters = Counters(self._regions[2])
        self._status_fd, status_write = os.pipe()
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  closed by stop()
        control, tokens, counted = (ref(region) for region in self._regions)
        channel = Channel(control, self._bell.fd, tokens, counted)
        config = WorkerConfig(name, core, channel, status_write, role, timeline)
        inherited = [*(region.fd for region in self._regions), self._bell.fd, *inherited_fds, status_write]
        self._process = launch(inherited, self._stderr.fileno(), _environment())
        os.close(status_write)
        self._status = b""
        try:
            pickle.dump(config, self._process.stdin)
            self._process.stdin.close()
        except BrokenPipeError:
            pass  # it died at once; wait_ready says why

    @property
    def pid(self) -> int:
        return self._process.pid

    # -- state ---------------------------------------------------------------------------------------------------------
    def wait_ready(self, deadline_s: float) -> None:
        """Block until the worker has loaded. Raises UserError with its own words where it refused, WorkerDied else."""
        while b"\n" not in self._status:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                raise WorkerDied(f"worker {self.name} was not ready in time; its last words: {self._last_words()}")
            readable, _, _ = select.select([self._status_fd], [], [], min(left_s, 1.0))
            if readable:
                chunk = os.read(self._status_fd, 65536)
                if not chunk:
                    self._raise_death()
                self._status += chunk
        line, self._status = self._status.split(b"\n", 1)
        message = json.loads(line)
        if message["state"] != "ready":
            raise UserError(f"worker {self.name}: {message['message']}")

    def check(self) -> None:
        """Raises WorkerDied, naming the worker and why, when the process has ended."""
        if self._process.poll() is not None:
            self._raise_death()

    def _raise_death(self) -> None:
        code = self._process.wait()
        how = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
        raise WorkerDied(f"worker {self.name} {how}; its last words: {self._last_words()}")

    def _last_words(self) -> str:
        select_ready, _, _ = select.select([self._status_fd], [], [], 0)
        if select_ready:
            self._status += os.read(self._status_fd, 65536)
        for line in reversed(self._status.splitlines()):
            return json.loads(line).get("message", "none")
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "none"

    # -- messages ------------------------------------------------------------------------------------------------------
    def send(self, message: Submit | Cancel | Stop) -> None:
        """Append to the control ring, waiting for room while the worker lives."""
        data = encode(message)
        while not self._control.push(data):
            self.check()
            time.sleep(0.001)

    def receive(self) -> list[Tokens | PoolUse]:
        """Everything the worker has reported since the last call."""
        messages = []
        while (data := self._tokens.pop()) is not None:
            messages.append(decode(data))
        return messages

    def read_counters(self) -> dict[str, int]:
        """The worker's counters as they are now."""
        return self.counters.read()

    # -- the end -------------------------------------------------------------------------------------------------------
    def stop(self) -> None:
        """Ask, wait, then kill; afterwards no process and no shared memory is left. Safe to call twice."""
        if self._status_fd < 0:
            return
        if self._process.poll() is None:
            self._control.push(encode(Stop()))
            try:
                self._process.wait(_STOP_GRACE_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        os.close(self._status_fd)
        self._status_fd = -1
        self._stderr.close()
        self._control.release()
        self._tokens.release()
        self.counters.release()
        self._bell.close()
        for region in self._regions:
            region.close()


def _environment() -> dict[str, str]:
    """The child's environment: one compute thread, and this repository importable wherever the host was started from."""
    paths = [str(_REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    return {**os.environ, **threads, "PYTHONPATH": os.pathsep.join(paths), "TOKENIZERS_PARALLELISM": "false"}
