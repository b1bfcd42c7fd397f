"""`python -m serving.gpu_suite.simulate DIR`: the loads that systems served on one card, simulated, beside what was measured.

Each measured row of :mod:`serving.gpu_suite.serve` is run again on the simulated backend: with costs of other people's kernels, as
assumed and of steps in parts as our engine does them; with those of our engine's measured steps (of models that have them); and
with what `--fit FILE` fits to some of the rows (:mod:`serving.gpu_suite.fit_loads`).
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
from serving.gpu_suite.simulated_load import MEASURED_CARD, Assumed, has_costs, simulate

AGAINST = "crosspool lowered"
Simulated = Mapping[Case, Mapping[str, Any]]
Ways = Mapping[str, Simulated]  # what is simulated, by what is assumed; a case may be missing


def rows_table(rows: Sequence[Row], ways: Ways) -> str:
    """Every row: milliseconds measured and simulated in each way; `*` where the fit was made to it."""
    head = ["file", "system", "KV GiB", "req/s", "seed"]
    head += [f"{what} {how}" for what in ("TBT", "P99 TBT", "TTFT") for how in ("measured", *ways)]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in rows:
        sources = [row.measured, *(simulated.get(row.case) for simulated in ways.values())]
        values = [f"{source[name] * 1e3:.1f}" if source else "" for name in TIMES for source in sources]
        star = " *" if fitted_to(row) else ""
        told = [row.file, row.case.label + star, f"{row.measured.get('kv_gib', 24):g}", f"{row.case.rate_rps:g}"]
        lines.append(f"| {' | '.join([*told, str(row.case.seed), *values])} |")
    return "\n".join(lines)


@dataclass(frozen=True)
class Ratio:
    """P99 TBT of a model over CrossPool's under the same load: measured, then simulated in each way (None where it was not)."""

    row: Row
    model: str
    values: tuple[float | None, ...]


def ratios(rows: Sequence[Row], ways: Ways) -> list[Ratio]:
    """Of all rows that tell models apart and whose load CrossPool had too."""
    base = {row.case.load: row for row in rows if row.case.label == AGAINST}
    found = []
    for row in rows:
        other = base.get(row.case.load)
        if row.case.label == AGAINST or other is None or "p99_by_model" not in row.measured:
            continue
        pairs = [(row.measured, other.measured), *((how.get(row.case), how.get(other.case)) for how in ways.values())]
        for model in sorted(row.measured["p99_by_model"]):
            values = [
                mine["p99_by_model"][model] / its["p99_by_model"][model] if mine and its else None
                for mine, its in pairs
            ]
            found.append(Ratio(row, model, tuple(values)))
    return found


def ratios_table(found: Sequence[Ratio], ways: Ways) -> str:
    head = ["file", "system", "KV GiB", "req/s", "seed", "model", f"P99 over {AGAINST}, measured", *ways]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for one in found:
        case, kv_gib = one.row.case, one.row.measured["kv_gib"]
        told = [one.row.file, case.label, f"{kv_gib:g}", f"{case.rate_rps:g}", str(case.seed), one.model]
        values = ["" if value is None else f"{value:.2f}" for value in one.values]
        lines.append(f"| {' | '.join([*told, *values])} |")
    return "\n".join(lines)


def ratio_errors_table(found: Sequence[Ratio], ways: Ways) -> str:
    """By system and way: medians of the ratios, and what they are simulated over measured: the median, the least and the most."""
    lines = [
        "| system | how | ratios | median measured | simulated | simulated / measured |",
        "|" + "---|" * 6,
    ]
    for label, (place, how) in itertools.product(
        dict.fromkeys(one.row.case.label for one in found), enumerate(ways, start=1)
    ):
        pairs = [(one.values[0], one.values[place]) for one in found if one.row.case.label == label]
        pairs = [pair for pair in pairs if pair[1] is not None]
        if pairs:
            middle = [f"{statistics.median(values):.2f}" for values in zip(*pairs, strict=True)]
            off = [simulated / measured for measured, simulated in pairs]
            told = f"{statistics.median(off):.2f} ({min(off):.2f} to {max(off):.2f})"
            lines.append(f"| {label} | {how} | {len(pairs)} | {' | '.join([*middle, told])} |")
    return "\n".join(lines)


def errors_table(rows: Sequence[Row], ways: Ways) -> str:
    """By system, and whether the fit was made to the rows: medians of simulated / measured, and the one farthest from 1."""
    lines = [
        "| system | rows | how | TBT | farthest | P99 TBT | farthest | TTFT | farthest |",
        "|" + "---|" * 9,
    ]
    groups: dict[tuple[str, bool], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.case.label, fitted_to(row)), []).append(row)
    for ((label, inside), same), (how, simulated) in itertools.product(groups.items(), ways.items()):
        known = [(row.measured, simulated[row.case]) for row in same if row.case in simulated]
        if not known:
            continue
        cells = []
        for name in TIMES:
            values = [mine[name] / measured[name] for measured, mine in known]
            farthest = max(values, key=lambda value: abs(math.log(value)))
            cells += [f"{statistics.median(values):.2f}", f"{farthest:.2f}"]
        kind = "fitted to" if inside else "held out"
        lines.append(f"| {label} | {len(known)} {kind} | {how} | {' | '.join(cells)} |")
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
    assumed = {
        "simulated": Assumed(),
        "in parts": Assumed(in_parts=True),
        "measured steps": Assumed(card=MEASURED_CARD),
        "fitted": found,
    }
    ways = {
        how: {row.case: simulate(row.case, each) for row in rows if has_costs(row.case, each)}
        for how, each in assumed.items()
    }
    share = found.contention.switch_s / found.contention.slice_s
    default = Contention().switch_s / Contention().slice_s
    print(f"Fitted: steps with prompts take {found.prompts:g} times as long (assumed: 1),")
    print(f"a switch between engines costs {share:.0%} of a slice (assumed: {default:.0%}).\n")
    compared = ratios(rows, ways)
    tables = [rows_table(rows, ways), ratios_table(compared, ways), errors_table(rows, ways)]
    print("\n\n".join([*tables, ratio_errors_table(compared, ways)]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
