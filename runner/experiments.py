"""The artifact's experiments, as data: what is run, in which modes, what it feeds, what it needs and how long it takes.

`./run_all.sh MODE` runs those of its mode through `bench.py`; each writes its records to the folder of its own name. A mode
with more seeds or points adds cells to the same folder: cells that are there already are not run again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

MODES = ("smoke", "fast", "full")


@dataclass(frozen=True)
class Experiment:
    """`base` and the sweep of a mode are arguments of `bench.py -m`. `sweeps` maps a mode to the values of each swept key;
    a mode that is missing does not run it. `cell_s` is the time of one cell on two cores, measured."""

    name: str
    question: str
    base: tuple[str, ...]
    sweeps: Mapping[str, Mapping[str, tuple[object, ...]]]
    figures: tuple[str, ...]
    cell_s: float
    memory_gib: float = 2.0
    disk_gib: float = 0.1
    needs_gpu: bool = False
    paper: str = ""
    systems: tuple[str, ...] = field(default=("crosspool", "static"))

    def cells(self, mode: str) -> int:
        """Runs that `mode` asks for."""
        count = len(self.systems)
        for values in self.sweeps[mode].values():
            count *= len(values)
        return count

    def minutes(self, mode: str) -> float:
        return self.cells(mode) * self.cell_s / 60

    def arguments(self, mode: str) -> list[str]:
        """Arguments of `python bench.py` for `mode`."""
        swept = [f"{key}={','.join(map(str, values))}" for key, values in self.sweeps[mode].items()]
        return ["-m", *self.base, f"experiment={self.name}", f"system={','.join(self.systems)}", *swept]


_SEED = "workload.seeds.schedule"
_SCARCE = ("conf=smoke",)

EXPERIMENTS: tuple[Experiment, ...] = (
    Experiment(
        name="smoke",
        question="Do both systems serve four models of four architectures whose KV hardly fits?",
        base=_SCARCE,
        sweeps={mode: {_SEED: (0, 1, 2)} for mode in MODES},
        figures=("summary", "tbt_cdf", "ttft_cdf", "kv_pages_over_time", "outcomes", "tbt_by_model"),
        cell_s=28,
    ),
    Experiment(
        name="rate",
        question="How do latency and goodput change with the offered rate?",
        base=_SCARCE,
        sweeps={
            "fast": {"workload.arrivals.rate_rps": (2, 5, 8), _SEED: (0, 1)},
            "full": {"workload.arrivals.rate_rps": (1, 2, 5, 8, 11, 14), _SEED: (0, 1, 2, 3, 4)},
        },
        figures=("latency_vs_rate", "goodput", "tbt_by_model", "outcomes", "summary"),
        cell_s=28,
        paper="Fig. 7",
    ),
    Experiment(
        name="skew",
        question="Who gains when few models get most requests?",
        base=_SCARCE,
        sweeps={
            "fast": {"workload.popularity.alpha": (0.0, 0.9, 2.1)},
            "full": {"workload.popularity.alpha": (0.0, 0.7, 0.9, 1.3, 1.7, 2.1), _SEED: (0, 1, 2)},
        },
        figures=("skew", "outcomes", "summary"),
        cell_s=28,
    ),
    Experiment(
        name="context",
        question="How long may prompts be before a share of KV is too small for them?",
        base=(
            *_SCARCE,
            "workload.lengths.kind=fixed",
            "workload.lengths.output_max=48",
            "workload.arrivals.rate_rps=3",
        ),
        sweeps={
            "fast": {"workload.lengths.prompt_max": (96, 192, 384)},
            "full": {"workload.lengths.prompt_max": (96, 128, 192, 256, 320, 384), _SEED: (0, 1, 2)},
        },
        figures=("context", "outcomes", "summary"),
        cell_s=28,
        paper="Fig. 6",
    ),
    Experiment(
        name="models",
        question="What does one more model cost when memory and total rate stay as they are?",
        base=("devices.0.memory_mib=12", "devices.1.memory_mib=12", "system.options.page_bytes=4096"),
        sweeps={"full": {"conf": ("models-2", "models-4", "models-8"), _SEED: (0, 1, 2)}},
        figures=("model_count", "outcomes", "summary"),
        cell_s=45,
    ),
    Experiment(
        name="ablation",
        question="What do the pipeline and lowered control bring, alone and together, at saturation?",
        base=("conf=ablation",),
        sweeps={
            "fast": {"system.options.lanes": (1, 2), "system.options.control": ("host", "lowered")},
            "full": {
                "system.options.lanes": (1, 2, 3),
                "system.options.control": ("host", "lowered"),
                _SEED: (0, 1, 2),
            },
        },
        figures=("ablation",),
        cell_s=40,
        memory_gib=8,
        disk_gib=1,
        paper="Table 3",
        systems=("crosspool",),
    ),
    Experiment(
        name="five-100m",
        question="The same comparison with five models of 100M parameters, where weights outweigh the interpreter.",
        base=("model=five-100m", "cluster=cpu2-large", "workload.arrivals.rate_rps=0.5", "workload.duration_s=120"),
        sweeps={"full": {_SEED: (0, 1, 2)}},
        figures=("summary", "tbt_cdf", "ttft_cdf", "kv_pages_over_time", "tbt_by_model"),
        cell_s=180,
        memory_gib=10,
        disk_gib=3,
    ),
)


def of_mode(mode: str) -> list[Experiment]:
    """The experiments that `mode` runs, in order."""
    return [experiment for experiment in EXPERIMENTS if mode in experiment.sweeps]
