"""Locks between processes, so that sweeps at once neither repeat a run nor measure each other.

The kernel drops a lock with the process that holds it: a killed run blocks nobody.
"""

from __future__ import annotations

import fcntl
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path


@contextmanager
def exclusive(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file `path`; says `what` is waited for where another process has it. Raises OSError where the file
    cannot be made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for {what}, which another run is using", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def computing(cores: Iterable[int], cards: Iterable[str] = ()) -> Iterator[None]:
    """Hold these cores, by number, and cards, by UUID, of this machine against other runs of this user. Always in the same order, so
    none deadlock."""
    folder = Path(tempfile.gettempdir()) / f"crosspool-{os.getuid()}"
    with ExitStack() as held:
        for kind, names in (("core", cores), ("card", cards)):
            for name in sorted(set(names)):
                held.enter_context(exclusive(folder / f"{kind}-{name}.lock", f"{kind} {name}"))
        yield
