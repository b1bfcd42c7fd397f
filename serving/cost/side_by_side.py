"""What steps in flight on one card cost each other, from those that `python -m serving.gpu_suite.side_by_side` measured there.

Every other pair of works is fitted to, as on a chessboard, the pairs between are held out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np

from serving.cost.card_steps import DTYPE, MeasuredStep, result
from serving.cost.contention import Contention, Load, slowdowns
from serving.cost.engine_kernels import step_kernels
from serving.cost.hardware import DECODE, KINDS, PROMPT, Hardware, load_hardware
from serving.cost.operators import CostModel
from serving.cost.stages import StageCosts
from serving.cost.table1 import published_spec
from serving.errors import UserError

_WHOLE = "step"


@dataclass(frozen=True)
class Pair:
    """The step `own` takes `beside_s` seconds while `other` repeats beside it; both hold what they take alone."""

    own: MeasuredStep
    other: MeasuredStep
    beside_s: float

    @property
    def ratio(self) -> float:
        return self.beside_s / self.own.seconds

    @property
    def kinds(self) -> tuple[str, str]:
        return kind_of(self.own), kind_of(self.other)


def kind_of(step: MeasuredStep) -> str:
    """As contention tells steps apart."""
    return PROMPT if step.chunks else DECODE


def read_side_by_side(path: str | Path) -> list[Pair]:
    """The pairs of whole steps in `path`, in order. Raises UserError where there are none."""
    with result(path, "side_by_side") as content:
        rows = [row for row in content["rows"] if row.get("side") == _WHOLE]
        alone = {_shape(row): row["step_ms"] / 1e3 for row in rows if row["beside"] is None}
        pairs = [
            Pair(
                *(MeasuredStep(*shape, alone[shape]) for shape in map(_shape, (row, row["beside"]))),
                row["step_ms"] / 1e3,
            )
            for row in rows
            if row["beside"] is not None
        ]
    if not pairs:
        raise UserError(f"{path}: holds no steps beside each other")
    return pairs


def _shape(row: Mapping) -> tuple:
    return tuple(row[name] for name in ("model", "batch", "context", "chunks", "rows", "past"))


def fitting_pairs(pairs: Sequence[Pair]) -> list[Pair]:
    """Every other square of what beside what."""
    steps = list(dict.fromkeys(step for pair in pairs for step in (pair.own, pair.other)))
    return [pair for pair in pairs if (steps.index(pair.own) + steps.index(pair.other)) % 2 == 0]


def load_of(step: MeasuredStep, hardware: Hardware) -> Load:
    """The step as contention sees it: what it moves and computes by arithmetic, in the time that it was measured to take alone."""
    costs = StageCosts(published_spec(step.model), CostModel(hardware, DTYPE))
    work = costs.mixed_step(step.batch, step.batch * step.context, [(step.rows, step.past)] * step.chunks).work
    kernels = step_kernels(costs.spec, step.batch, [step.rows] * step.chunks)
    return Load(step.seconds, work.bytes, work.flops, kind=kind_of(step), kernels=kernels)


def measured_interference(card: str, pairs: Sequence[Pair]) -> dict[str, dict[str, float]]:
    """What part of a kernel of a step of one kind, by the other's kind, goes before a kernel of one beside it: the median over `pairs`,
    by kinds, of what a step loses a kernel, over what a kernel of the other takes. Raises UserError where two kinds were not
    measured beside each other."""
    hardware = load_hardware(card)
    parts: dict[tuple[str, str], list[float]] = {}
    for pair in pairs:
        own, other = (load_of(step, hardware) for step in (pair.own, pair.other))
        parts.setdefault(pair.kinds, []).append((pair.ratio - 1) * own.kernel_s / other.kernel_s)
    if missing := [kinds for kinds in product(KINDS, KINDS) if kinds not in parts]:
        raise UserError(f"no {missing[0][0]} step was measured beside one of {missing[0][1]}")
    return {own: {other: max(float(np.median(parts[own, other])), 0.0) for other in KINDS} for own in KINDS}


@dataclass(frozen=True)
class PairErrors:
    """Of pairs of two kinds, held out or fitted to: how many, how many times as long as alone they take, in the median, and by how much
    predicted ones are off: the median error, the largest, and the bias (the median of predicted / measured - 1)."""

    kinds: tuple[str, str]
    held_out: bool
    count: int
    ratio: float
    median: float
    worst: float
    bias: float


def judge_pairs(hardware: Hardware, pairs: Sequence[Pair]) -> list[PairErrors]:
    """How near `hardware`, of a calibration, comes to `pairs`."""
    fitted_to, cells = set(fitting_pairs(pairs)), {}
    for pair in pairs:
        loads = [load_of(step, hardware) for step in (pair.own, pair.other)]
        off = slowdowns(loads, hardware, Contention(), DTYPE)[0] / pair.ratio - 1
        cells.setdefault((pair.kinds, pair not in fitted_to), []).append((pair.ratio, off))
    judged = []
    for (kinds, held_out), found in sorted(cells.items()):
        ratios, offs = np.array(found).T
        sizes = np.abs(offs)
        spread = (float(value) for value in (np.median(ratios), np.median(sizes), sizes.max(), np.median(offs)))
        judged.append(PairErrors(kinds, held_out, len(found), *spread))
    return judged


def pairs_table(judged: Sequence[PairErrors]) -> str:
    """As Markdown."""
    head = ["step", "beside", "", "count", "times as long", "median error", "largest", "bias"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for one in judged:
        cells = [*one.kinds, "held out" if one.held_out else "fitted to", str(one.count), f"{one.ratio:.2f}"]
        cells += [f"{one.median:.1%}", f"{one.worst:.1%}", f"{one.bias:+.1%}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
