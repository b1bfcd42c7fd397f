"""`python -m serving.gpu_suite.simulate DIR`: the loads that systems served on one card, simulated, beside what was measured.

Each measured row of :mod:`serving.gpu_suite.serve` is run again on the simulated backend: the same requests, systems, budgets
and limits, on a card with the costs that were fitted to other people's kernels. Elastic engines are processes without MPS, so
that the card runs them in turns (`time_slice`, serving/cost/contention.py); of CrossPool both pools are on the one card, and
their stages slow each other as engines do that share it.

Two numbers are fitted, by `--fit FILE`, to the rows of elastic.json: `prompts` to static's (one process, nobody to contend
with), then what a switch between engines costs of a slice to elastic's. Every other row is held out. Only that share counts in
the model, so the slice keeps the length that it is assumed to have.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from serving import registry
from serving.cost.contention import Contention, Load, slowdowns
from serving.cost.hardware import load_hardware
from serving.cost.operators import CostModel
from serving.cost.stages import Stage, StageCosts
from serving.cost.table1 import published_spec
from serving.errors import UserError, command
from serving.gpu_suite.serve import (
    OPTIONS,
    SYSTEMS,
    p99_by_model,
    pool_bytes,
    replay,
    requests_of,
    summary,
)
from serving.interface import Cluster, Demand, Device, Request, ServedModel
from serving.sim.backend import SimulatedBackend

CARD = "h200"
FILES = ("serve.json", "elastic.json", "elastic_seeds.json", "mixtral.json")
AGAINST = "crosspool lowered"
TIMES = ("tbt_mean_s", "tbt_p99_s", "ttft_mean_s")
FIT_FILE = "elastic.json"
FITTED = Path(__file__).resolve().parent / "fitted_h200.json"
_PROMPTS = (1.0, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8, 2.0)
_SWITCHES = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3)  # shares of a slice
_LIMIT_S = 600.0
# Of the runs before rows said so: their models, requests, prompts, and pools that nobody filled.
_FIRST_MODELS = ("deepseek-v2-lite", "qwen3-30b-a3b")
_FIRST_REQUESTS, _FIRST_PROMPTS, _FIRST_POOLS_GIB = 30, (64, 512), (24, 96)


@dataclass(frozen=True)
class Case:
    """One load of one system: which of :data:`SYSTEMS`, and what it was asked. `pools_bytes` are CrossPool's two; the sum is
    what the others had. `skew` None: models drawn as the first runs did."""

    label: str
    models: tuple[str, ...]
    pools_bytes: tuple[int, int]
    rate_rps: float
    requests: int
    seed: int
    prompts: tuple[int, int]
    skew: float | None

    @property
    def load(self) -> tuple:
        """What systems have in common that served the same."""
        return (self.models, self.pools_bytes, self.rate_rps, self.requests, self.seed, self.prompts, self.skew)

    def arrivals(self) -> list[tuple[float, Request]]:
        models = _served(self.models)
        return requests_of(models, self.rate_rps, self.requests, self.seed, self.prompts, self.skew)


@dataclass(frozen=True)
class Row:
    """One case with what was measured of it."""

    file: str
    case: Case
    measured: Mapping[str, Any]


def read_rows(folder: Path) -> list[Row]:
    """The measured rows of `folder` that are simulated here. Raises UserError where a file is no result of the suite."""
    found = []
    for name in FILES:
        path = folder / name
        if not path.exists():
            continue
        try:
            rows = json.loads(path.read_text())["rows"]
            found += [Row(name, case_of(row), row) for row in rows if "error" not in row]
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"{path} is not a result of python -m serving.gpu_suite.serve") from None
    if not found:
        raise UserError(f"{folder}: holds none of {', '.join(FILES)}")
    return found


def case_of(row: Mapping[str, Any]) -> Case:
    """What the system of a measured row was asked."""
    names = tuple(row.get("models", _FIRST_MODELS))
    rate_rps = row["rate_rps"]
    if "kv_gib" in row:
        pools = pool_bytes(_served(names), int(row["kv_gib"] * 2**30))
        seed = 1000 * row.get("seed", 0) + int(10 * (rate_rps / len(names)))
    else:
        pools, seed = tuple(gib << 30 for gib in _FIRST_POOLS_GIB), int(rate_rps)
    return Case(
        row["system"],
        names,
        pools,
        rate_rps,
        row.get("requests", _FIRST_REQUESTS),
        seed,
        tuple(row.get("prompts", _FIRST_PROMPTS)),
        row.get("skew"),
    )


@dataclass(frozen=True)
class Assumed:
    """What a simulation assumes of the card beside the costs of other people's kernels: that steps with prompts in them take
    `prompts` times as long with ours, and how engines contend."""

    prompts: float = 1.0
    contention: Contention = field(default_factory=lambda: Contention(mode="time_slice"))


def simulate(case: Case, assumed: Assumed) -> dict[str, Any]:
    """As a row of :mod:`serving.gpu_suite.serve`: P99 by model, and the summary of all."""
    name, options = SYSTEMS[case.label]
    if name == "elastic":
        told = {key: getattr(assumed.contention, key) for key in ("interference", "slice_s", "switch_s")}
        options = {**options, "contention": assumed.contention.mode, **told}
    system = registry.create(name, {**OPTIONS, **options})
    backend = SimulatedBackend(
        CARD, lambda model, device: _stages(model.spec.name, name == "crosspool", assumed.prompts)
    )
    system.start(system.plan(_cluster(name, case.pools_bytes), _served(case.models), Demand()), backend)
    try:
        arrivals = case.arrivals()
        times = replay(system, arrivals, _LIMIT_S, backend.clock)
    finally:
        system.stop()
    return {"p99_by_model": p99_by_model(times, arrivals), **summary(times)}


class _CardStages(StageCosts):
    """Whole models on one card; stages of more rows than a decode step can have take `prompts` times as long. Where
    `halves_share`, stages of both halves of a model may run at once: beside another that streams its memory, each takes as
    much longer as a kernel of an engine beside that of another (`share`)."""

    def __init__(self, name: str, halves_share: bool, prompts: float) -> None:
        super().__init__(published_spec(name), CostModel(load_hardware(CARD)))
        self._halves_share, self._prompts = halves_share, prompts

    def share(self, parts: int) -> StageCosts:
        return self if parts == 1 else super().share(parts)

    def beside_stream(self, operator: str) -> float:
        if not self._halves_share:
            return 1.0
        stage = self.attention(1, 64) if operator == "stage_decode" else self.ffn(self.spec.num_layers - 1, 1)
        stream = Load(1.0, self.hardware.memory_bandwidth, 0.0)
        return slowdowns([stage.load(), stream], self.hardware, Contention(), self.dtype)[0]

    def _prefill_attention_layer(self, new_tokens: int, past_tokens: int) -> Stage:
        return self._longer(super()._prefill_attention_layer(new_tokens, past_tokens))

    def _ffn_layer(self, layer: int, tokens: int) -> Stage:
        stage = super()._ffn_layer(layer, tokens)
        return self._longer(stage) if tokens > OPTIONS["max_batch"] else stage

    def _longer(self, stage: Stage) -> Stage:
        return Stage(self._prompts * stage.device_s, stage.work, stage.kernels)


_stages = functools.lru_cache(maxsize=8)(_CardStages)  # costs are remembered with them


def _served(names: Iterable[str]) -> list[ServedModel]:
    return [ServedModel(published_spec(name), Path(), "bfloat16", dummy=True) for name in names]


def _cluster(name: str, pools_bytes: tuple[int, int]) -> Cluster:
    """As :func:`serving.gpu_suite.serve.cluster_for`, of devices that are simulated."""
    if name != "crosspool":
        return Cluster((Device("gpu0", "cuda", 0, sum(pools_bytes), card=CARD),))
    return Cluster(
        tuple(Device(pool, "cuda", 0, size, card=CARD) for pool, size in zip(("kv", "weights"), pools_bytes))
    )


# -- the fit ------------------------------------------------------------------------------------------------------------------
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
    by_prompts = {prompts: _distance(static, Assumed(prompts)) for prompts in _PROMPTS}
    prompts = min(by_prompts, key=by_prompts.__getitem__)
    by_switch = {share: _distance(elastic, _with_switch(prompts, share)) for share in _SWITCHES}
    return Fit(_with_switch(prompts, min(by_switch, key=by_switch.__getitem__)), by_prompts, by_switch)


def _with_switch(prompts: float, share: float) -> Assumed:
    """A switch takes `share` of a slice."""
    return Assumed(prompts, Contention("time_slice", switch_s=share * Contention().slice_s))


def _distance(rows: Sequence[Row], assumed: Assumed) -> float:
    found = [(row.measured, simulate(row.case, assumed)) for row in rows]
    logs = [math.log(simulated[name] / measured[name]) for measured, simulated in found for name in TIMES]
    return math.sqrt(statistics.fmean(value * value for value in logs))


def write_fit(path: Path, found: Fit, rows: Sequence[Row]) -> None:
    """Write what was fitted, and what it rests on."""
    fitting = [row for row in rows if _fitted_to(row)]
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


# -- tables -------------------------------------------------------------------------------------------------------------------
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
        star = " *" if _fitted_to(row) else ""
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
        groups.setdefault((row.case.label, _fitted_to(row)), []).append(row)
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


def _fitted_to(row: Row) -> bool:
    return row.file == FIT_FILE and row.case.label in ("static", "elastic")


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
