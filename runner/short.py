"""`CROSSPOOL_SHORT=1`: every command does its least, so that tests (and the impatient) can see that it works at all.

`bench.py` runs the first cell of a sweep with a second of arrivals; `./run_all.sh` runs the first experiment of its mode.
Records say so in their configuration (`workload.duration_s`), so no later command takes one for the run that was asked for.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

VARIABLE = "CROSSPOOL_SHORT"
_DURATION = "workload.duration_s"


def is_short() -> bool:
    return os.environ.get(VARIABLE, "") not in ("", "0")


def shortened(arguments: Sequence[str]) -> list[str]:
    """Arguments of `bench.py` that run the first cell for a second."""
    if {"--help", "-h", "--cfg", "-c"} & set(arguments):
        return list(arguments)
    kept = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if key == _DURATION:
            continue
        swept = equals and not set(value) & set("[{\"'")
        kept.append(f"{key}={value.split(',')[0]}" if swept else argument)
    return [*kept, f"{_DURATION}=1"]
