"""What the suite's measurements leave behind: rows, and the card and versions that they were measured with."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import time
from pathlib import Path

import torch


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
