"""A calibration of this machine, read back: its hardware description and stage costs of the models it measured."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from serving.cost import facts
from serving.cost.facts import Work
from serving.cost.fit import Fitted, fit_rows
from serving.cost.fitted_set import FittedSet, fitted_set
from serving.cost.form import Kernel
from serving.cost.forms import FORMS
from serving.cost.hardware import Hardware, load_hardware
from serving.cost.roofline import SharedStages
from serving.cost.silicon import Rows
from serving.cost.stages import ModelStages, Stage
from serving.cost.table import MeasuredTable
from serving.cost.transfers import shared_memory_exchange_s
from serving.errors import UserError
from serving.spec import ModelSpec

CPU = "cpu2"


@dataclasses.dataclass(frozen=True)
class MeasuredRow:
    """One measured point, ready for the table."""

    operator: str
    variant: str
    columns: dict[str, float]
    seconds: float


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What one calibration file holds."""

    hardware: Hardware
    dtype: str
    fitted: FittedSet
    rows: Mapping[str, Rows]  # by operator
    beside_stream: Mapping[str, Mapping[str, float]]  # model -> operator -> slowdown beside a core that streams memory
    spread: Mapping[str, Sequence[float]]  # model -> how much steps differ (serving/cost/worker_steps.py)

    def models(self) -> tuple[str, ...]:
        """Names of the models whose stages were measured."""
        return tuple(sorted({str(v) for rows in self.rows.values() for v in rows.variant}))

    def tables(self) -> dict[str, MeasuredTable]:
        """A table for every measured operator."""
        return {
            name: MeasuredTable(rows, self.hardware, self.fitted.coefficients(name)) for name, rows in self.rows.items()
        }

    def seconds_of(self) -> Callable[[str, str, Mapping[str, float]], float]:
        """What gives the seconds of an operator of a model at a point: those of its line, as far off as the points around it."""
        tables = self.tables()

        def seconds(operator: str, model: str, columns: Mapping[str, float]) -> float:
            coefficients = self.fitted.variants[operator, model].coefficients
            line = float(FORMS[operator].cost(coefficients, columns, self.hardware, Kernel()))
            return line * tables[operator].correction(model, columns)

        return seconds


def rows_by_operator(measured: Iterable[MeasuredRow]) -> dict[str, Rows]:
    """Measured points as columns, one table an operator."""
    grouped: dict[str, list[MeasuredRow]] = {}
    for row in measured:
        grouped.setdefault(row.operator, []).append(row)
    return {operator: _joined(operator, rows) for operator, rows in grouped.items()}


def _joined(operator: str, rows: list[MeasuredRow]) -> Rows:
    columns = {name: np.array([row.columns[name] for row in rows]) for name in rows[0].columns}
    variants, seconds = np.array([row.variant for row in rows]), np.array([row.seconds for row in rows])
    return Rows(CPU, operator, columns, variants, seconds, ())


def calibration(
    rates: Mapping[str, Any],
    dtype: str,
    rows: Mapping[str, Rows],
    provenance: Mapping[str, object],
    beside_stream: Mapping[str, Mapping[str, float]] | None = None,
    spread: Mapping[str, Sequence[float]] | None = None,
    card: str = CPU,
) -> Calibration:
    """A calibration of `card` from measured rates and rows: coefficients are fitted to all rows."""
    hardware = _measured_hardware(card, rates, provenance)
    fits = [fit for mine in rows.values() for fit in fit_rows(mine, hardware)]
    return Calibration(
        hardware, dtype, fitted_set(card, fits, provenance), dict(rows), beside_stream or {}, spread or {}
    )


def _measured_hardware(name: str, rates: Mapping[str, Any], provenance: Mapping[str, object]) -> Hardware:
    card = load_hardware(name)
    note = f"measured by calibrate on {provenance.get('machine', 'this machine')}, {provenance.get('date', '')}"
    return dataclasses.replace(card, **rates, sources={**card.sources, **dict.fromkeys(rates, note)})


def write_calibration(path: Path, found: Calibration, rates: Mapping[str, Any]) -> None:
    """Write to `path`, whole or not at all."""
    content = {
        "card": found.fitted.card,
        "dtype": found.dtype,
        "provenance": found.fitted.provenance,
        "machine": dict(rates),
        "beside_stream": found.beside_stream,
        "spread": found.spread,
        "fits": [dataclasses.asdict(fit) for fit in found.fitted.variants.values()],
        "rows": {
            name: {
                "columns": {column: values.tolist() for column, values in rows.columns.items()},
                "variant": rows.variant.tolist(),
                "seconds": rows.seconds.tolist(),
            }
            for name, rows in found.rows.items()
        },
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)


def read_calibration(path: str | Path) -> Calibration:
    """The calibration in `path`. Raises :class:`UserError` when there is none, or it cannot be read."""
    path = Path(path)
    try:
        content = json.loads(path.read_text())
        hardware = _measured_hardware(content["card"], content["machine"], content["provenance"])
        fitted = fitted_set(content["card"], [Fitted(**entry) for entry in content["fits"]], content["provenance"])
        rows = {name: _rows(name, table) for name, table in content["rows"].items()}
        return Calibration(hardware, content["dtype"], fitted, rows, content["beside_stream"], content["spread"])
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; `python -m serving.cost calibrate --out {path}` writes it") from None
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a calibration ({error!r})") from None


def join(paths: Iterable[str | Path], target: str | Path) -> None:
    """Write to `target` the mean of the calibrations in `paths`, of the same points: a machine's speed drifts, so calibrate
    before, within and after what is to be compared. Raises UserError where points differ."""
    contents = [json.loads(Path(path).read_text()) for path in paths if read_calibration(path)]
    first = contents[0]
    points = [{name: {**table, "seconds": ()} for name, table in content["rows"].items()} for content in contents]
    if any(other != points[0] for other in points) or any(c["dtype"] != first["dtype"] for c in contents):
        raise UserError(f"{', '.join(map(str, paths))}: calibrations of different points cannot be joined")

    def mean(values_of: Callable[[dict], float]) -> float:
        return statistics.fmean(map(values_of, contents))

    measured = {}
    for name, table in first["rows"].items():
        seconds = np.mean([content["rows"][name]["seconds"] for content in contents], axis=0)
        measured[name] = _rows(name, {**table, "seconds": seconds})
    rates = {key: mean(lambda content, key=key: content["machine"][key]) for key in first["machine"]}
    beside = {
        model: {key: mean(lambda content, at=(model, key): content["beside_stream"][at[0]][at[1]]) for key in found}
        for model, found in first["beside_stream"].items()
    }
    spread = {
        model: [mean(lambda content, at=(model, part): content["spread"][at[0]][at[1]]) for part in range(len(found))]
        for model, found in first["spread"].items()
    }
    provenance = {**first["provenance"], "joined": len(contents)}
    write_calibration(Path(target), calibration(rates, first["dtype"], measured, provenance, beside, spread), rates)


def _rows(operator: str, table: Mapping[str, Mapping]) -> Rows:
    columns = {name: np.array(values, dtype=float) for name, values in table["columns"].items()}
    return Rows(CPU, operator, columns, np.array(table["variant"]), np.array(table["seconds"]), ())


class CalibratedStages(ModelStages):
    """Stages of one model as they were measured on this machine, interpolated between the measured sizes."""

    def __init__(self, spec: ModelSpec, found: Calibration):
        if spec.name not in found.models():
            raise UserError(
                f"model {spec.name!r} was not calibrated; known: {', '.join(found.models()) or 'none'} "
                "(python -m serving.cost calibrate --model DIR)"
            )
        super().__init__(spec, found.dtype, found.hardware)
        self._found, self._seconds_of = found, found.seconds_of()

    def head(self, rows: int) -> Stage:
        """With the last residual and all else that ends a step."""
        return Stage(self._seconds("stage_end", rows=rows), facts.head_work(self.spec, rows, self.dtype), 1)

    def embedding(self, tokens: int) -> Stage:
        """With all else that a step of so many rows does but once: composing it, mapping pages, its layout."""
        return Stage(self._seconds("stage_begin", rows=tokens), facts.embedding_work(self.spec, tokens, self.dtype), 1)

    def beside_stream(self, operator: str) -> float:
        """Measured slowdown of a stage (`stage_decode`, `stage_routed`) beside a streaming core; 1 unmeasured."""
        return self._found.beside_stream.get(self.spec.name, {}).get(operator, 1.0)

    @property
    def spread(self) -> tuple[float, ...]:
        return tuple(self._found.spread.get(self.spec.name, ()))

    def share(self, parts: int) -> ModelStages:
        """Not measured: the whole stage's seconds, by the bytes and FLOPs that a share has of its work."""
        return SharedStages(self, parts) if parts > 1 else self

    def exchange_s(self, message_bytes: int, ranks: int) -> float:
        return shared_memory_exchange_s(self.hardware, message_bytes, ranks)

    def launched_s(self, stage: Stage) -> float:
        """Measured stages hold their operators' dispatch already."""
        return stage.device_s

    def _decode_attention_layer(self, batch: int, context_tokens: int) -> Stage:
        seconds = self._seconds("stage_decode", batch_size=batch, context=context_tokens / batch)
        core = facts.decode_core_work(self.spec, batch, context_tokens, self.dtype)
        return Stage(seconds, core + self._projections(batch, absorbed=True), 1)

    def _prefill_attention_layer(self, new_tokens: int, past_tokens: int) -> Stage:
        seconds = self._seconds("stage_prefill", isl=new_tokens, past=past_tokens)
        core = facts.prefill_core_work(self.spec, new_tokens, past_tokens, self.dtype)
        return Stage(seconds, core + self._projections(new_tokens, absorbed=True), 1)

    def _ffn_layer(self, layer: int, tokens: int) -> Stage:
        work = facts.ffn_work(self.spec, layer, tokens, self.dtype)
        if self.spec.is_dense(layer):
            return Stage(self._seconds("stage_dense", rows=tokens), work, 1)
        hit = self.spec.moe.distinct_experts(tokens)
        return Stage(self._seconds("stage_routed", num_tokens=tokens, distinct=hit), work, 1)

    def _projections(self, rows: int, absorbed: bool) -> Work:
        return facts.projection_work(self.spec, rows, self.dtype, absorbed=absorbed)

    def measured(self, operator: str) -> bool:
        """Whether it was measured of this model."""
        return (operator, self.spec.name) in self._found.fitted.variants

    def _seconds(self, operator: str, **columns: float) -> float:
        return self._seconds_of(operator, self.spec.name, {"hidden_size": float(self.spec.hidden_size), **columns})
