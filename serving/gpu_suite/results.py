"""What the suite's measurements leave behind: rows, and the card and versions that they were measured with."""

from __future__ import annotations

import gc
import importlib.metadata
import json
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from serving.gpu_suite.steps_table import Row


def save(path: Path, rows: object) -> None:
    """Write `rows` to `path`, beside the hardware and software."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
        driver = ", ".join(dict.fromkeys(driver.split()))
    except (OSError, subprocess.SubprocessError):
        driver = "unknown"
    made = {
        "hardware": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "driver": driver,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "triton")},
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "rows": rows,
    }
    path.write_text(json.dumps(made, indent=1) + "\n")


def free_card() -> None:
    """Give back what the models that were measured last had on the card; nothing may hold them any more."""
    gc.collect()  # graphs and what they run refer to each other
    torch.cuda.empty_cache()


def conclude(rows: Sequence[Row], table: Callable[[Sequence[Row]], str], named: Callable[[Row], str]) -> int:
    """Print the `table` of the rows that were measured and a line for each that holds an `error`, by its name: the exit status."""
    failed = [row for row in rows if "error" in row]
    print(table([row for row in rows if "error" not in row]))
    for row in failed:
        print(f"row: {named(row)}: {row['error']}")
    return int(bool(failed))
