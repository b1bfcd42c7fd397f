"""The one exception a person is meant to read.

Every command of this project catches :class:`UserError`, prints its message as one line on standard error and exits with
status 2. Anything else that escapes is a bug and keeps its traceback.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable


class UserError(Exception):
    """Bad input or an environment that cannot serve it. The message is one line: what, where, and what would be right."""


class CapacityError(UserError):
    """Something does not fit. The message names the device or pool and the missing bytes."""


class WorkerDied(UserError):
    """A worker process ended when it should not have. The message names the worker and what it last said."""


def one_line(message: object) -> str:
    """`message` folded to one line."""
    return " ".join(str(message).split())


def command(main: Callable[..., int | None]) -> Callable[..., int]:
    """Decorate a command's `main`: a :class:`UserError` becomes one line and status 2, an interrupt status 130,
    a reader that went away status 141."""

    @functools.wraps(main)
    def wrapped(*args, **kwargs) -> int:
        try:
            return main(*args, **kwargs) or 0
        except UserError as error:
            print(f"error: {one_line(error)}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        except BrokenPipeError:
            # Whoever read our output (head, less) has enough; the interpreter must not complain when it flushes at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141

    return wrapped
