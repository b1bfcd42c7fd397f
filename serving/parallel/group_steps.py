"""A calibration of ranks of groups on a card, from steps that `python -m serving.gpu_suite.group_steps` measured of one rank, and
exchanges that `python -m serving.gpu_suite.memory` measured between cards.

As for whole models (:mod:`serving.cost.card_steps`), every other point of a rank's grid is fitted to and the points between are held
out.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from serving.cost.calibrated import Calibration, MeasuredRow, calibration, rows_by_operator
from serving.cost.card_steps import (
    DTYPE,
    FITTED_TO,
    MeasuredStep,
    beside_rows,
    fitting_half,
    layer_rows,
    result,
    step_of,
)
from serving.cost.check import Errors, errors
from serving.cost.table1 import published_spec
from serving.errors import UserError
from serving.parallel.costs import StepShape
from serving.parallel.group import GroupPlan
from serving.parallel.measured_costs import EXCHANGE, RankStages, passes_of, variant_of

_EXCHANGED = re.compile(r"sum over (\d+) cards, (\d+) rows")
_EXCHANGED_ROW_BYTES = 2048 * 2  # of the rows that serving.gpu_suite.memory exchanges


@dataclass(frozen=True)
class RankStep:
    """A step of one rank, exchanges not in it: `active` of `dp` replicas do the same `step`, the others nothing; `launch_s` of it
    are the host's."""

    step: MeasuredStep
    tp: int
    dp: int
    active: int
    launch_s: float

    @property
    def variant(self) -> str:
        return variant_of(self.step.model, self.tp, self.dp)

    @property
    def plan(self) -> GroupPlan:
        return GroupPlan(tuple(f"card {rank}" for rank in range(self.tp * self.dp)), self.tp, self.dp)

    @property
    def shapes(self) -> list[StepShape]:
        """By replica."""
        step = self.step
        own = StepShape(step.batch, step.batch * step.context, ((step.rows, step.past),) * step.chunks)
        return [own if replica < self.active else StepShape() for replica in range(self.dp)]


def read_rank_steps(path: str | Path) -> tuple[list[RankStep], dict[str, Any]]:
    """The steps in `path`, and what they were measured on. Raises UserError where it holds none."""
    with result(path, "group_steps") as content:
        steps = [_rank_step(row) for row in content.pop("rows") if "error" not in row]
    if not steps:
        raise UserError(f"{path}: holds no step")
    return steps, content


def _rank_step(row: Mapping[str, Any]) -> RankStep:
    return RankStep(step_of(row), row["tp"], row["dp"], row["active"], row["launch_ms"] / 1e3)


def read_exchanges(path: str | Path) -> tuple[list[MeasuredRow], dict[str, Any]]:
    """Sums between cards in `path`, and what they were measured on. Raises UserError where it holds none."""
    with result(path, "memory on several cards") as content:
        measured = content.pop("rows")["exchange_us"]
        found = [(_EXCHANGED.fullmatch(what), value / 1e6) for what, value in measured.items()]
    rows = [
        MeasuredRow(
            "collective",
            EXCHANGE,
            {"num_gpus": float(match[1]), "message_size": float(match[2]) * _EXCHANGED_ROW_BYTES},
            seconds,
        )
        for match, seconds in found
        if match
    ]
    if not rows:
        raise UserError(f"{path}: holds no sum over cards")
    return rows, content


def fitting_steps(steps: Sequence[RankStep]) -> list[RankStep]:
    """Every other point of each rank's grids, those with one replica active and with all apart."""
    chosen = []
    for cell in dict.fromkeys((one.variant, one.active) for one in steps):
        mine = [one for one in steps if (one.variant, one.active) == cell]
        half = set(fitting_half([one.step for one in mine]))
        chosen += [one for one in mine if one.step in half]
    return chosen


def calibrate_ranks(
    card: str, steps: Iterable[RankStep], exchanges: Iterable[MeasuredRow], provenance: Mapping[str, object]
) -> Calibration:
    """A calibration of `card` from those of `steps` that have one prompt at most."""
    several = list(steps)
    rows = [row for one in several if one.step.kind in FITTED_TO for row in _rows(one)]
    beside = beside_rows((one.variant, one.step) for one in several if one.active == 1)
    return calibration({}, DTYPE, rows_by_operator([*rows, *beside, *exchanges]), provenance, card=card)


def _rows(one: RankStep) -> Iterator[MeasuredRow]:
    (one_pass,) = passes_of(one.shapes)
    yield from layer_rows(one.step, one.variant, *one_pass)
    columns = {"hidden_size": float(published_spec(one.step.model).hidden_size), "rows": float(one.step.size[0])}
    yield MeasuredRow("stage_begin", one.variant, columns, one.launch_s)


@dataclass(frozen=True)
class RankErrors:
    """Steps of one rank and kind, held out or fitted to: errors, and by how much each is too long (the median of predicted /
    measured - 1). Exchanges are in neither."""

    variant: str
    kind: str
    held_out: bool
    after: Errors
    bias: float


def judge(steps: Sequence[RankStep], found: Calibration) -> list[RankErrors]:
    """Errors on the steps that were fitted to and on the others."""
    fitted_to = set(fitting_steps(steps))
    cells: dict[tuple[str, str, bool], list[RankStep]] = {}
    for one in steps:
        cells.setdefault((one.variant, one.step.kind, one not in fitted_to), []).append(one)
    judged = []
    for (variant, kind, held_out), mine in sorted(cells.items()):
        rank = RankStages(published_spec(mine[0].step.model), mine[0].plan, found, exchanges=False)
        predicted = np.array([rank.step_s(one.shapes) for one in mine])
        measured = np.array([one.step.seconds for one in mine])
        bias = statistics.median(predicted / measured - 1)
        judged.append(RankErrors(variant, kind, held_out, errors(predicted, measured), float(bias)))
    return judged


def errors_table(judged: Sequence[RankErrors]) -> str:
    """As Markdown."""
    head = ["rank", "steps", "", "count", "bias", "median error", "P90"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for one in judged:
        cells = [one.variant, one.kind, "held out" if one.held_out else "fitted to", str(one.after.rows)]
        cells += [f"{one.bias:+.0%}", f"{one.after.median:.1%}", f"{one.after.p90:.1%}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
