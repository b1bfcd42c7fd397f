"""A calibration of this project's engine on a card, from steps that `python -m serving.gpu_suite.steps` measured there.

Of a step of prompts or of decode rows alone each side was measured alone; the whole step's time is shared out between its layers by
that. What decode rows add to a chunk's attention in the same pass is the difference of the sides that were measured. Every other
point of a model's grid of sizes and tokens that are there is fitted to, the points between are held out; of steps of both every
other one, and all of several prompts.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from serving.cost.calibrated import Calibration, MeasuredRow, calibration, rows_by_operator
from serving.cost.check import Errors, errors
from serving.cost.hardware import load_hardware
from serving.cost.measured_card import CardStages, graph_rows
from serving.cost.operators import CostModel
from serving.cost.stages import ModelStages, StageCosts
from serving.cost.table1 import published_spec
from serving.errors import UserError

DTYPE = "bfloat16"
KINDS = ("decode", "prompt", "both", "several prompts")
FITTED_TO, _SIDES = KINDS[:2], KINDS[:3]
_CONTROL = "fused"


@dataclass(frozen=True)
class MeasuredStep:
    """One measured step: `batch` sequences of `context` tokens each once it is done decode, `chunks` prompts have `rows` tokens
    after `past` computed. Seconds of the whole, and where it has one prompt at most those of each side alone."""

    model: str
    batch: int
    context: int
    chunks: int
    rows: int
    past: int
    seconds: float
    attention_s: float = 0.0
    ffn_s: float = 0.0
    dense_s: float = 0.0  # of `ffn_s`, in layers without experts

    @property
    def kind(self) -> str:
        """One of :data:`KINDS`."""
        if self.chunks > 1:
            return "several prompts"
        if self.chunks:
            return "both" if self.batch else "prompt"
        return "decode"

    @property
    def size(self) -> tuple[int, int]:
        """Of a decode step, or one of a prompt: its rows, and the tokens that are there."""
        return (self.rows, self.past) if self.chunks else (self.batch, self.context)

    @property
    def graph(self) -> int:
        """Rows that the graph of a decode step, or one of a prompt, computes."""
        return graph_rows(self.size[0], chunk=self.chunks > 0)


@contextmanager
def result(path: str | Path, command: str) -> Iterator[dict[str, Any]]:
    """What `command` of the suite wrote to `path`, to be taken apart within. Raises UserError where it is no such thing."""
    try:
        yield json.loads(Path(path).read_text())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is not a result of python -m serving.gpu_suite.{command}") from None


def read_steps(path: str | Path) -> tuple[list[MeasuredStep], dict[str, Any]]:
    """The steps in `path` that ran as one graph, and what they were measured on. Raises UserError where it holds none."""
    with result(path, "steps") as content:
        steps = [step_of(row) for row in content.pop("rows") if row.get("control") == _CONTROL]
    if not steps:
        raise UserError(f"{path}: holds no step under {_CONTROL} control")
    return steps, content


def step_of(row: Mapping[str, Any]) -> MeasuredStep:
    """The step of a row, in milliseconds there. Raises KeyError for what is no such row."""
    shape = {name: row[name] for name in ("model", "batch", "context", "chunks", "rows", "past")}
    step = MeasuredStep(**shape, seconds=row["step_ms"] / 1e3)
    if step.kind not in _SIDES:
        return step
    sides = {f"{side}_s": row[f"{side}_ms"] / 1e3 for side in ("attention", "ffn", "dense")}
    return dataclasses.replace(step, **sides)


def fitting_half(steps: Sequence[MeasuredStep]) -> list[MeasuredStep]:
    """Every other point of each model's grid of decode steps and of prompts, as on a chessboard, and every other step of both."""
    chosen = []
    for model, kind in dict.fromkeys((step.model, step.kind) for step in steps if step.kind in FITTED_TO):
        mine = [step for step in steps if (step.model, step.kind) == (model, kind)]
        sizes, there = (sorted({step.size[axis] for step in mine}) for axis in (0, 1))
        chosen += [step for step in mine if (sizes.index(step.size[0]) + there.index(step.size[1])) % 2 == 0]
    for model in dict.fromkeys(step.model for step in steps):
        chosen += [step for step in steps if (step.model, step.kind) == (model, "both")][::2]
    return chosen


def calibrate_card(
    card: str,
    steps: Iterable[MeasuredStep],
    provenance: Mapping[str, object],
    rates: Mapping[str, Any] | None = None,
) -> Calibration:
    """A calibration of `card` from those of `steps` that have one prompt at most; `rates` are what else was measured of it."""
    several = list(steps)
    layers = [
        row
        for step in several
        if step.kind in FITTED_TO
        for row in layer_rows(step, step.model, step.graph, step.graph)
    ]
    rows = rows_by_operator([*layers, *beside_rows((step.model, step) for step in several)])
    return calibration(rates or {}, DTYPE, rows, provenance, card=card)


def layer_rows(step: MeasuredStep, variant: str, ffn_rows: int, differing: int) -> Iterator[MeasuredRow]:
    """What a layer's stages take of such a step, as rows of `variant`. Its FFNs compute `ffn_rows` rows, of which so many are
    `differing`: the others repeat one of them, and its experts."""
    spec = published_spec(step.model)
    dense = len(spec.dense_layers)
    common, stretch = {"hidden_size": float(spec.hidden_size)}, step.seconds / (step.attention_s + step.ffn_s)
    if step.chunks:
        operator, sizes = "stage_prefill", {"isl": float(step.graph), "past": float(step.past)}
    else:
        operator, sizes = "stage_decode", {"batch_size": float(step.batch), "context": float(step.context)}
    yield MeasuredRow(operator, variant, common | sizes, stretch * step.attention_s / spec.num_layers)
    routed = {"num_tokens": float(ffn_rows), "distinct": spec.moe.distinct_experts(differing)}
    routed_s = (step.ffn_s - step.dense_s) / (spec.num_layers - dense)
    yield MeasuredRow("stage_routed", variant, common | routed, stretch * routed_s)
    if dense:
        yield MeasuredRow("stage_dense", variant, common | {"rows": float(ffn_rows)}, stretch * step.dense_s / dense)


def beside_rows(steps: Iterable[tuple[str, MeasuredStep]]) -> Iterator[MeasuredRow]:
    """What decode rows add to a layer's attention of a chunk, of (variant, step): the difference to that of such a chunk alone, on
    the line between those of as many rows that are among `steps` (none where it would lie outside)."""
    alone: dict[tuple[str, int], dict[int, float]] = {}
    several = list(steps)
    for variant, step in several:
        if step.kind == "prompt":
            alone.setdefault((variant, step.rows), {})[step.past] = step.attention_s
    for variant, step in several:
        chunk = alone.get((variant, step.rows), {}) if step.kind == "both" else {}
        pasts = sorted(chunk)
        if pasts and pasts[0] <= step.past <= pasts[-1]:
            added_s = step.attention_s - float(np.interp(step.past, pasts, [chunk[past] for past in pasts]))
            spec = published_spec(step.model)
            sizes = {"batch_size": float(step.batch), "context": float(step.context)}
            columns = {"hidden_size": float(spec.hidden_size), **sizes}
            yield MeasuredRow("stage_beside", variant, columns, max(added_s, 0.0) / spec.num_layers)


@dataclass(frozen=True)
class StepErrors:
    """Whole steps of one model and kind, held out or fitted to: errors with the costs that the card had before, and with the
    calibration, and by how much each is too long (the median of predicted / measured - 1)."""

    model: str
    kind: str
    held_out: bool
    before: Errors
    after: Errors
    bias_before: float
    bias_after: float


def judge(card: str, steps: Sequence[MeasuredStep], found: Calibration) -> list[StepErrors]:
    """Errors on the fitting half of `steps` and on the others."""
    fitted_to, cost = set(fitting_half(steps)), CostModel(load_hardware(card), DTYPE)
    cells: dict[tuple[str, str, bool], list[MeasuredStep]] = {}
    for step in steps:
        cells.setdefault((step.model, step.kind, step not in fitted_to), []).append(step)
    judged = []
    for (model, kind, held_out), mine in sorted(cells.items()):
        spec = published_spec(model)
        measured = np.array([step.seconds for step in mine])
        before, after = (
            np.array([_predicted_s(stages, step) for step in mine])
            for stages in (StageCosts(spec, cost), CardStages(spec, found))
        )
        biases = [float(np.median(predicted / measured - 1)) for predicted in (before, after)]
        judged.append(
            StepErrors(model, kind, held_out, errors(before, measured), errors(after, measured), *biases)
        )  # fmt: skip
    return judged


def _predicted_s(stages: ModelStages, step: MeasuredStep) -> float:
    chunks = [(step.rows, step.past)] * step.chunks
    return stages.launched_s(stages.mixed_step(step.batch, step.batch * step.context, chunks))


def errors_table(judged: Sequence[StepErrors], card: str) -> str:
    """As Markdown."""
    head = ["model", "steps", "", "count"]
    head += [f"{card}: {what}" for what in ("bias", "median error", "P90")]
    head += [f"measured: {what}" for what in ("bias", "median error", "P90")]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for one in judged:
        cells = [one.model, one.kind, "held out" if one.held_out else "fitted to", str(one.before.rows)]
        for bias, error in ((one.bias_before, one.before), (one.bias_after, one.after)):
            cells += [f"{bias:+.0%}", f"{error.median:.1%}", f"{error.p90:.1%}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
