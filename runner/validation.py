"""`python -m runner.validation DIR`: the simulator against the machine that it was calibrated on, cell by cell.

DIR holds records of the same cells on both backends (`conf=validation` says how to make them). Cells agree when they ask the
same of the same system; every metric of every cell is shown, misses too, with the bound that it is to keep.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from runner.identity import config_hash
from runner.records import COMPLETE, Record, read_records
from serving.errors import UserError, command

BOUNDS = {"mean_itl_ms": 0.10, "p99_itl_ms": 0.20, "mean_ttft_ms": 0.20, "output_throughput": 0.08}
SIMULATED_ALONE = ("contention", "interference", "slice_s", "switch_s")  # options that say nothing to a real system
QUIET = 0.02  # of the cores: what more other programs take while a cell is measured is told


@dataclass(frozen=True)
class Compared:
    """One metric of one cell, means over what was run of it. `other_cpu_share` is the most that other programs took of the
    devices' cores in any of the measured runs: what they took is in the measurement and not in the simulation."""

    system: str
    cell: str
    metric: str
    measured: float
    simulated: float
    other_cpu_share: float = 0.0

    @property
    def error(self) -> float:
        return self.simulated / self.measured - 1

    @property
    def within(self) -> bool:
        return abs(self.error) <= BOUNDS[self.metric]


def compare(records: Iterable[Record]) -> list[Compared]:
    """Every metric of every cell that was both run and simulated."""
    cells: dict[tuple[str, str, str], dict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        if record.status == COMPLETE:
            cells[_cell(record)][record.content["backend"]].append(record)
    found = []
    for (system, label, _), by_backend in sorted(cells.items()):
        if {"real", "sim"} <= set(by_backend):
            for metric in BOUNDS:
                measured, simulated = (
                    statistics.fmean(record.content["metrics"][metric] for record in by_backend[backend])
                    for backend in ("real", "sim")
                )
                found.append(Compared(system, label, metric, measured, simulated, _taken(by_backend["real"])))
    return found


def _taken(records: Iterable[Record]) -> float:
    return max(record.content["metrics"].get("other_cpu_share") or 0.0 for record in records)


def _cell(record: Record) -> tuple[str, str, str]:
    """(system, what a person calls the cell, identity of all that was asked)."""
    config = record.content["config"]
    asked = {key: config[key] for key in ("models", "devices", "workload")}
    workload, options = config["workload"], config["system"]["options"]
    asked["system"] = {name: value for name, value in options.items() if name not in SIMULATED_ALONE}
    lengths = workload["lengths"]
    parts = [f"{workload['arrivals']['rate_rps']:g} req/s"]
    for name in ("prompt", "output"):
        if f"{name}_min" in lengths:
            parts.append(f"{name}s {lengths[f'{name}_min']}-{lengths[f'{name}_max']}")
    parts.append(f"batch {options.get('max_batch', '?')}")
    parts.append(f"seed {workload['seeds']['schedule']}")
    return record.content["system"], ", ".join(parts), config_hash(asked)


def table(compared: Sequence[Compared]) -> str:
    """The comparison as text, and how many of its entries keep their bound."""
    lines = [f"{'system':<10} {'cell':<66} {'metric':<18} {'measured':>9} {'simulated':>9} {'error':>7} {'bound':>6}"]
    for one in compared:
        lines.append(
            f"{one.system:<10} {one.cell:<66} {one.metric:<18} {one.measured:9.2f} {one.simulated:9.2f} "
            f"{one.error:+7.1%} {BOUNDS[one.metric]:6.0%}{'' if one.within else '  MISS'}"
        )
    kept = sum(one.within for one in compared)
    lines.append(f"{kept} of {len(compared)} within their bounds")
    disturbed = {(one.system, one.cell): one.other_cpu_share for one in compared if one.other_cpu_share > QUIET}
    lines += [
        f"{system} {cell}: other programs took up to {share:.0%} of the cores while it was measured"
        for (system, cell), share in disturbed.items()
    ]
    return "\n".join(lines)


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m runner.validation", description=__doc__.splitlines()[0])
    parser.add_argument("records", type=Path, help="folder of records of both backends")
    parser.add_argument("--csv", type=Path, help="write the table there too")
    arguments = parser.parse_args(argv)
    records, _ = read_records(arguments.records)
    compared = compare(records)
    if not compared:
        raise UserError(f"{arguments.records}: no cell that was both run (backend=real) and simulated (backend=sim)")
    print(table(compared))
    if arguments.csv:
        with arguments.csv.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["system", "cell", "metric", "measured", "simulated", "error", "bound", "other_cpu_share"])
            for one in compared:
                bound = BOUNDS[one.metric]
                values = [one.system, one.cell, one.metric, one.measured, one.simulated, one.error, bound]
                writer.writerow([*values, one.other_cpu_share])
    return 0


if __name__ == "__main__":
    sys.exit(main())
