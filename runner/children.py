"""Commands that the artifact runs as processes of their own, and how they end when the artifact is told to stop.

A Ctrl-C reaches the whole foreground group, the child included, which then needs a moment to write what it has; a SIGTERM (of
`timeout`, a batch system, a container) reaches only its addressee and is passed on.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

_GRACE_S = 15.0  # a run stops its workers and writes its record in about one


def run_child(arguments: Sequence[str], directory: Path) -> int:
    """The exit status of `python ARGUMENTS` in `directory`; KeyboardInterrupt once an interrupted child has ended, too."""
    child = subprocess.Popen([sys.executable, *arguments], cwd=directory)
    try:
        with _passed_on(child):
            return child.wait()
    except KeyboardInterrupt:
        _end(child)
        raise
    finally:
        if child.poll() is None:  # it heeded nobody, or we were interrupted again while it ended
            child.kill()
            child.wait()


def _end(child: subprocess.Popen[bytes]) -> None:
    """Wait for a child that knows; tell one that does not."""
    try:
        child.wait(_GRACE_S)
    except subprocess.TimeoutExpired:
        child.terminate()
        with suppress(subprocess.TimeoutExpired):
            child.wait(_GRACE_S)


@contextmanager
def _passed_on(child: subprocess.Popen[bytes]) -> Iterator[None]:
    """While it runs, a SIGTERM goes to the child as well and then counts as an interrupt."""

    def pass_on(*_: object) -> None:
        child.terminate()
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
