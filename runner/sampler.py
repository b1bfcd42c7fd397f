"""What the machine did while a run computed: cores, memory and GPUs, sampled a few hundred times at most.

W&B's own monitor would have to run beside the workers, on the cores that are measured; one sample here takes well under a
millisecond (a GPU's some tens, in another process), and its thread sleeps in between.
"""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Sequence
from typing import Any, Self

import psutil

_MOST_SAMPLES = 400


class SystemSampler:
    """Samples while entered. `samples` are flat: `time_s` since the start, `core<i>_percent` of the
    given cores, `memory_bytes` in use on the machine, `gpu<i>_percent` and `gpu<i>_memory_mib` where `gpus`. When there are
    many, every second one is dropped and the interval doubles."""

    def __init__(self, cores: Sequence[int], gpus: bool = False, interval_s: float = 1.0) -> None:
        self._cores, self._gpus, self._interval_s = tuple(cores), gpus, interval_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample_until_ended, name="system-sampler", daemon=True)
        self.samples: list[dict[str, Any]] = []

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _sample_until_ended(self) -> None:
        begun, before = time.monotonic(), psutil.cpu_times(percpu=True)
        ended = False
        while not ended:
            ended = self._ended.wait(self._interval_s)  # the last sample ends with the run, however short
            now = psutil.cpu_times(percpu=True)
            sample: dict[str, Any] = {"time_s": round(time.monotonic() - begun, 3)}
            sample |= {f"core{core}_percent": _busy_percent(before[core], now[core]) for core in self._cores}
            sample["memory_bytes"] = psutil.virtual_memory().used
            self.samples.append(sample | (_gpu_sample() if self._gpus else {}))
            before = now
            if len(self.samples) >= _MOST_SAMPLES:
                self.samples = self.samples[1::2]
                self._interval_s *= 2


def _busy_percent(before: Any, now: Any) -> float:
    total = sum(now[:8]) - sum(before[:8])  # up to stolen time: guests' is in the users' already
    idle = now.idle + now.iowait - before.idle - before.iowait
    return round(100 * (1 - idle / total), 1) if total > 0 else 0.0


def _gpu_sample() -> dict[str, float]:
    query = ["nvidia-smi", "--query-gpu=index,utilization.gpu,memory.used", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    sample = {}
    for line in done.stdout.splitlines():
        index, percent, memory_mib = (word.strip() for word in line.split(","))
        sample |= {f"gpu{index}_percent": float(percent), f"gpu{index}_memory_mib": float(memory_mib)}
    return sample
