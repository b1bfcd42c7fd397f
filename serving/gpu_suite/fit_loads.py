"""What a simulated card needs to come nearest to measured loads: two numbers, fitted to static and elastic engines of one file.

`prompts` is fitted to static's rows (one process, nobody to contend with), then what a switch between engines costs of a slice
to elastic's. Every other row is held out. Only that share counts in the model, so the slice keeps the length that it is assumed
to have.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from serving.cost.contention import Contention
from serving.errors import UserError
from serving.gpu_suite.loads import FILES, Row
from serving.gpu_suite.simulated_load import CARD, Assumed, simulate

TIMES = ("tbt_mean_s", "tbt_p99_s", "ttft_mean_s")
FIT_FILE = "elastic.json"
FITTED = Path(__file__).resolve().parent / "fitted_h200.json"
_PROMPTS = (1.0, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8, 2.0)
_SWITCHES = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3)  # shares of a slice


@dataclass(frozen=True)
class Fit:
    """What came nearest, and how far everything that was tried is from its rows: the root of the mean square of the logarithms
    of simulated / measured, by `prompts` and by what a switch takes of a slice."""

    assumed: Assumed
    by_prompts: Mapping[float, float]
    by_switch: Mapping[float, float]


def fit(rows: Sequence[Row]) -> Fit:
    """The nearest to the rows of :data:`FIT_FILE`. Raises UserError where there are none."""
    fitting = [row for row in rows if row.file == FIT_FILE]
    static, elastic = ([row for row in fitting if row.case.label == label] for label in ("static", "elastic"))
    if not (static and elastic):
        raise UserError(f"{FIT_FILE} has no rows of static and elastic, to which the fit is made")
    by_prompts = {prompts: _distance(static, Assumed(prompts=prompts)) for prompts in _PROMPTS}
    prompts = min(by_prompts, key=by_prompts.__getitem__)
    by_switch = {share: _distance(elastic, _with_switch(prompts, share)) for share in _SWITCHES}
    return Fit(_with_switch(prompts, min(by_switch, key=by_switch.__getitem__)), by_prompts, by_switch)


def _with_switch(prompts: float, share: float) -> Assumed:
    """A switch takes `share` of a slice."""
    return Assumed(prompts=prompts, contention=Contention("time_slice", switch_s=share * Contention().slice_s))


def _distance(rows: Sequence[Row], assumed: Assumed) -> float:
    found = [(row.measured, simulate(row.case, assumed)) for row in rows]
    logs = [math.log(simulated[name] / measured[name]) for measured, simulated in found for name in TIMES]
    return math.sqrt(statistics.fmean(value * value for value in logs))


def write_fit(path: Path, found: Fit, rows: Sequence[Row]) -> None:
    """Write what was fitted, and what it rests on."""
    fitting = [row for row in rows if fitted_to(row)]
    contention = found.assumed.contention
    content = {
        "card": CARD,
        "prompts": found.assumed.prompts,
        "switch_share": round(contention.switch_s / contention.slice_s, 3),
        "provenance": {
            "rows": f"{len(fitting)} measured rows of {FIT_FILE}, static and elastic",
            "command": "python -m serving.gpu_suite.simulate results/h200 --fit serving/gpu_suite/fitted_h200.json",
            "held_out": f"all rows of {', '.join(name for name in FILES if name != FIT_FILE)}, and crosspool's",
            "distance_by_prompts": {f"{value:g}": round(far, 4) for value, far in found.by_prompts.items()},
            "distance_by_switch_share": {f"{value:g}": round(far, 4) for value, far in found.by_switch.items()},
        },
    }
    path.write_text(json.dumps(content, indent=1) + "\n")


def read_fit(path: Path = FITTED) -> Assumed:
    """What `write_fit` wrote. Raises UserError where it cannot be read."""
    try:
        content = json.loads(path.read_text())
        return _with_switch(content["prompts"], content["switch_share"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path}: no fit; python -m serving.gpu_suite.simulate DIR --fit {path} makes one") from None


def fitted_to(row: Row) -> bool:
    """Whether the fit is made to `row`."""
    return row.file == FIT_FILE and row.case.label in ("static", "elastic")
