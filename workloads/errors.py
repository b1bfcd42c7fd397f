"""The one error of this package: a description or a file that cannot become a trace. The message is one line."""

from __future__ import annotations


class WorkloadError(ValueError):
    """What is wrong, where, and what would be right."""
