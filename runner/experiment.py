"""One experiment of the artifact, as data: what is run, in which modes, what it feeds, what it needs and how long it takes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

_PRESETS = Path(__file__).resolve().parents[1] / "conf" / "system"


@dataclass(frozen=True)
class Experiment:
    """`base` and the sweep of a mode are arguments of `bench.py -m`. `sweeps` maps a mode to the values of each swept key;
    a mode that is missing does not run it. `cell_s` is the time of one cell on two cores, measured. `systems` are presets of
    conf/system; a mode that sweeps `system` itself runs fewer of them."""

    name: str
    question: str
    base: tuple[str, ...]
    sweeps: Mapping[str, Mapping[str, tuple[object, ...]]]
    figures: tuple[str, ...]
    cell_s: float
    memory_gib: float = 2.0
    disk_gib: float = 0.1
    gpus: int = 0  # cards that it needs, each of
    gpu_gib: float = 0.0
    paper: str = ""
    systems: tuple[str, ...] = field(default=("crosspool", "static"))
    figures_of: Mapping[str, str] = field(default_factory=dict)  # exhibits that only a run of this system fills
    cell_s_in: Mapping[str, float] = field(default_factory=dict)  # of a mode whose cells are shorter than `cell_s`
    studies: tuple[tuple[str, ...], ...] = ()  # arguments of `python -m runner.study` instead of runs

    @property
    def present(self) -> tuple[str, ...]:
        """Those of `systems`, presets of conf/system, that this version has."""
        return tuple(system for system in self.systems if (_PRESETS / f"{system}.yaml").is_file())

    @property
    def drawn(self) -> tuple[str, ...]:
        """Exhibits that its runs fill in this version."""
        return (*self.figures, *(name for name, system in self.figures_of.items() if system in self.present))

    @property
    def absent(self) -> tuple[str, ...]:
        return tuple(system for system in self.systems if system not in self.present)

    def run_by(self, mode: str) -> tuple[str, ...]:
        """Those of `present` that `mode` runs."""
        return tuple(system for system in self.sweeps[mode].get("system", self.systems) if system in self.present)

    def cells(self, mode: str) -> int:
        """Runs, or studies, that `mode` asks for."""
        if self.studies:
            return len(self.studies)
        swept = [values for key, values in self.sweeps[mode].items() if key != "system"]
        return len(self.run_by(mode)) * math.prod(map(len, swept))

    def minutes(self, mode: str) -> float:
        return self.cells(mode) * self.cell_s_in.get(mode, self.cell_s) / 60

    def arguments(self, mode: str) -> list[str]:
        """Arguments of `python bench.py` for `mode`. Systems come last, which varies fastest: they take turns in every other cell, so
        that a machine whose speed drifts over a sweep is not slower for one of them."""
        values = {key: found for key, found in self.sweeps[mode].items() if key != "system"}
        values["system"] = self.run_by(mode)
        swept = [f"{key}={','.join(map(str, found))}" for key, found in values.items()]
        return ["-m", *self.base, f"experiment={self.name}", *swept]
