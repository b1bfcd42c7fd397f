"""`python -m runner.validation DIR`: the simulator against the machine that it was calibrated on, cell by cell.

DIR holds records of the same cells on both backends (`python -m runner.validation_rounds` makes them). Cells agree when they ask
the same of the same system; every metric of every cell is shown, misses too, with the bound that it is to keep. A cell that was
measured in several rounds (`repeat`), each simulated with the calibration of its own time, is judged by the median over rounds
of the error: a machine's speed drifts by more than the bounds.
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
_COLUMNS = (
    "system",
    "cell",
    "metric",
    "round",
    "measured",
    "simulated",
    "error",
    "median_error",
    "bound",
    "other_cpu_share",
)
QUIET = 0.02  # of the cores: what more other programs take while a cell is measured is told


@dataclass(frozen=True)
class Compared:
    """One metric of one cell: by round that was run and simulated, the mean of what was run of it. `other_cpu_share` is the most
    that other programs took of the devices' cores in any of the measured runs: what they took is in the measurement and not in
    the simulation."""

    system: str
    cell: str
    metric: str
    measured: tuple[float, ...]
    simulated: tuple[float, ...]
    other_cpu_share: float = 0.0

    @property
    def errors(self) -> list[float]:
        return [simulated / measured - 1 for measured, simulated in zip(self.measured, self.simulated, strict=True)]

    @property
    def error(self) -> float:
        return statistics.median(self.errors)

    @property
    def within(self) -> bool:
        return self._keeps(self.error)

    def within_in(self, position: int) -> bool:
        """Whether the bound is kept in the round at `position` alone."""
        return self._keeps(self.errors[position])

    def _keeps(self, error: float) -> bool:
        return abs(error) <= BOUNDS[self.metric]


def compare(records: Iterable[Record]) -> list[Compared]:
    """Every metric of every cell that was both run and simulated, in at least one round."""
    cells: dict[tuple[str, str, str], dict[int, dict[str, list[Record]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(list))
    )
    for record in records:
        if record.status == COMPLETE:
            repeat = record.content["config"].get("repeat", 0)
            cells[_cell(record)][repeat][record.content["backend"]].append(record)
    found = []
    for (system, label, _), by_round in sorted(cells.items()):
        rounds = [by_backend for _, by_backend in sorted(by_round.items()) if {"real", "sim"} <= set(by_backend)]
        for metric in BOUNDS if rounds else ():
            measured, simulated = (
                tuple(
                    statistics.fmean(record.content["metrics"][metric] for record in by_backend[backend])
                    for by_backend in rounds
                )
                for backend in ("real", "sim")
            )
            taken = max(_taken(by_backend["real"]) for by_backend in rounds)
            found.append(Compared(system, label, metric, measured, simulated, taken))
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
    """The comparison as text, medians over rounds, and how many of its entries keep their bound: by the median, and in each
    round alone where all cells have as many."""
    rounds = {len(one.errors) for one in compared}
    several = max(rounds, default=1) > 1
    told = f" {'least':>6} {'most':>6} {'rounds':>6}" if several else ""
    lines = [
        f"{'system':<10} {'cell':<66} {'metric':<18} {'measured':>9} {'simulated':>9} {'error':>7}{told} {'bound':>6}"
    ]
    for one in compared:
        told = f" {min(one.errors):+6.0%} {max(one.errors):+6.0%} {len(one.errors):6}" if several else ""
        each = "  by round: " + " ".join(f"{error:+.0%}" for error in one.errors) if several else ""
        lines.append(
            f"{one.system:<10} {one.cell:<66} {one.metric:<18} {statistics.median(one.measured):9.2f} "
            f"{statistics.median(one.simulated):9.2f} {one.error:+7.1%}{told} {BOUNDS[one.metric]:6.0%}"
            f"{each}{'' if one.within else '  MISS'}"
        )
    kept = f"{sum(one.within for one in compared)} of {len(compared)} within their bounds"
    if several:
        kept += f", by the median of {min(rounds)}" + (f" to {max(rounds)}" if len(rounds) > 1 else "") + " rounds"
    if several and len(rounds) == 1:
        alone = [sum(one.within_in(position) for one in compared) for position in range(max(rounds))]
        kept += f"; in each round alone: {', '.join(map(str, alone))}"
    lines.append(kept)
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
    parser.add_argument("--csv", type=Path, help="write every round's values there too")
    arguments = parser.parse_args(argv)
    records, _ = read_records(arguments.records)
    compared = compare(records)
    if not compared:
        raise UserError(f"{arguments.records}: no cell that was both run (backend=real) and simulated (backend=sim)")
    print(table(compared))
    if arguments.csv:
        with arguments.csv.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(_COLUMNS)
            for one in compared:
                for number, values in enumerate(zip(one.measured, one.simulated, one.errors, strict=True), start=1):
                    named = [one.system, one.cell, one.metric, number, *values]
                    writer.writerow([*named, one.error, BOUNDS[one.metric], one.other_cpu_share])
    return 0


if __name__ == "__main__":
    sys.exit(main())
