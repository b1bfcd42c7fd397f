"""Stages at the level that they have on a worker.

A point (serving/cost/calibrate.py) says how a stage grows with rows and context, and is measured in one or two moments. What a
layer takes in the steps of a worker is measured some hundred times, spread over the whole calibration, with whatever a point
leaves out: the caches as the step before left them, and which experts a sequence's rows hit. So points of so many rows are
taken times what the worker needs for as many over what the points say of it; of numbers of rows in between, what lies in
between.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Mapping

import numpy as np

from serving.cost.calibrated import Calibration, MeasuredRow
from serving.cost.silicon import Rows

ROWS_OF = {"stage_decode": "batch_size", "stage_prefill": "isl", "stage_routed": "num_tokens", "stage_dense": "rows"}
# What a worker takes over what points say: operator and model -> rows -> ratio.
Levels = dict[tuple[str, str], dict[float, float]]


def levels(found: Calibration, layers: Iterable[MeasuredRow]) -> Levels:
    """What each row of `layers`, stages of a worker's steps, takes over what `found` says of it."""
    seconds_of, ratios = found.seconds_of(), {}
    for row in layers:
        ratio = row.seconds / seconds_of(row.operator, row.variant, row.columns)
        ratios.setdefault((row.operator, row.variant), {})[row.columns[ROWS_OF[row.operator]]] = ratio
    return ratios


def mean_levels(ratios: Levels) -> dict[tuple[str, str], float]:
    """Of each operator and model, over all numbers of rows."""
    return {key: statistics.geometric_mean(by_rows.values()) for key, by_rows in ratios.items()}


def anchored(rows: Mapping[str, Rows], ratios: Levels) -> dict[str, Rows]:
    """The points `rows`, by operator, at these levels. Beyond the most and the fewest rows of a worker's steps their levels
    hold; points of which no step has any stay as they are."""
    return {operator: _anchored(operator, mine, ratios) for operator, mine in rows.items()}


def _anchored(operator: str, rows: Rows, ratios: Levels) -> Rows:
    seconds = rows.seconds.copy()
    for (of, model), by_rows in ratios.items():
        if of == operator:
            here = rows.variant == model
            counts = sorted(by_rows)
            logs = np.log([by_rows[count] for count in counts])
            seconds[here] *= np.exp(np.interp(np.log(rows.columns[ROWS_OF[of]][here]), np.log(counts), logs))
    return dataclasses.replace(rows, seconds=seconds)
