"""`python -m serving.gpu_suite.simulate DIR`: the loads that systems served on one card, simulated, beside what was measured.

Each measured row of :mod:`serving.gpu_suite.serve` is run again on the simulated backend, once as assumed and once with what
`--fit FILE` fits to some of them (:mod:`serving.gpu_suite.fit_loads`).
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serving.cost.contention import Contention
from serving.errors import command
from serving.gpu_suite.fit_loads import FITTED, TIMES, fit, fitted_to, read_fit, write_fit
from serving.gpu_suite.loads import Case, Row, read_rows
from serving.gpu_suite.simulated_load import Assumed, simulate

AGAINST = "crosspool lowered"
Simulated = Mapping[Case, Mapping[str, Any]]


def rows_table(rows: Sequence[Row], assumed: Simulated, fitted: Simulated) -> str:
    """Every row: milliseconds measured, simulated as assumed, and with the fit; `*` where the fit was made to it."""
    head = ["file", "system", "KV GiB", "req/s", "seed"]
    head += [f"{what} {how}" for what in ("TBT", "P99 TBT", "TTFT") for how in ("measured", "simulated", "fitted")]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in rows:
        values = [
            f"{source[name] * 1e3:.1f}"
            for name in TIMES
            for source in (row.measured, assumed[row.case], fitted[row.case])
        ]
        star = " *" if fitted_to(row) else ""
        told = [row.file, row.case.label + star, f"{row.measured.get('kv_gib', 24):g}", f"{row.case.rate_rps:g}"]
        lines.append(f"| {' | '.join([*told, str(row.case.seed), *values])} |")
    return "\n".join(lines)


@dataclass(frozen=True)
class Ratio:
    """P99 TBT of a model over CrossPool's under the same load: measured, simulated as assumed, and with the fit."""

    row: Row
    model: str
    values: tuple[float, float, float]


def ratios(rows: Sequence[Row], assumed: Simulated, fitted: Simulated) -> list[Ratio]:
    """Of all rows that tell models apart and whose load CrossPool had too."""
    base = {row.case.load: row for row in rows if row.case.label == AGAINST}
    found = []
    for row in rows:
        other = base.get(row.case.load)
        if row.case.label == AGAINST or other is None or "p99_by_model" not in row.measured:
            continue
        pairs = [(row.measured, other.measured), *((how[row.case], how[other.case]) for how in (assumed, fitted))]
        for model in sorted(row.measured["p99_by_model"]):
            values = [mine["p99_by_model"][model] / its["p99_by_model"][model] for mine, its in pairs]
            found.append(Ratio(row, model, tuple(values)))
    return found


def ratios_table(found: Sequence[Ratio]) -> str:
    lines = [
        f"| file | system | KV GiB | req/s | seed | model | P99 over {AGAINST}, measured | simulated | fitted |",
        "|" + "---|" * 9,
    ]
    for one in found:
        case, kv_gib = one.row.case, one.row.measured["kv_gib"]
        told = [one.row.file, case.label, f"{kv_gib:g}", f"{case.rate_rps:g}", str(case.seed), one.model]
        lines.append(f"| {' | '.join([*told, *(f'{value:.2f}' for value in one.values)])} |")
    return "\n".join(lines)


def ratio_errors_table(found: Sequence[Ratio]) -> str:
    """By system: medians of the ratios, and what they are simulated over measured: the median, the least and the most."""
    lines = [
        "| system | ratios | median measured | simulated | fitted | simulated / measured | fitted / measured |",
        "|" + "---|" * 7,
    ]
    for label in dict.fromkeys(one.row.case.label for one in found):
        same = [one.values for one in found if one.row.case.label == label]
        cells = [f"{statistics.median(values):.2f}" for values in zip(*same, strict=True)]
        for how in (1, 2):
            off = [values[how] / values[0] for values in same]
            cells.append(f"{statistics.median(off):.2f} ({min(off):.2f} to {max(off):.2f})")
        lines.append(f"| {label} | {len(same)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def errors_table(rows: Sequence[Row], assumed: Simulated, fitted: Simulated) -> str:
    """By system, and whether the fit was made to the rows: medians of simulated / measured, and the one farthest from 1."""
    lines = [
        "| system | rows | how | TBT | farthest | P99 TBT | farthest | TTFT | farthest |",
        "|" + "---|" * 9,
    ]
    groups: dict[tuple[str, bool], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.case.label, fitted_to(row)), []).append(row)
    for ((label, inside), same), (how, simulated) in itertools.product(
        groups.items(), (("simulated", assumed), ("fitted", fitted))
    ):
        cells = []
        for name in TIMES:
            values = [simulated[row.case][name] / row.measured[name] for row in same]
            farthest = max(values, key=lambda value: abs(math.log(value)))
            cells += [f"{statistics.median(values):.2f}", f"{farthest:.2f}"]
        kind = "fitted to" if inside else "held out"
        lines.append(f"| {label} | {len(same)} {kind} | {how} | {' | '.join(cells)} |")
    return "\n".join(lines)


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m serving.gpu_suite.simulate", description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--fit", type=Path, metavar="FILE", help="fit anew, and write what was found to FILE")
    args = parser.parse_args(argv)
    rows = read_rows(args.folder)
    if args.fit:
        write_fit(args.fit, fit(rows), rows)
    found = read_fit(args.fit or FITTED)
    assumed, fitted = ({row.case: simulate(row.case, how) for row in rows} for how in (Assumed(), found))
    share = found.contention.switch_s / found.contention.slice_s
    default = Contention().switch_s / Contention().slice_s
    print(f"Fitted: steps with prompts take {found.prompts:g} times as long (assumed: 1),")
    print(f"a switch between engines costs {share:.0%} of a slice (assumed: {default:.0%}).\n")
    compared = ratios(rows, assumed, fitted)
    tables = [rows_table(rows, assumed, fitted), ratios_table(compared), errors_table(rows, assumed, fitted)]
    print("\n\n".join([*tables, ratio_errors_table(compared)]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
