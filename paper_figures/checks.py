"""How a claim's number is computed from shapes or from records. One function a check; paper.yaml names them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from paper_figures.kv_capacity import usable
from paper_figures.paper import facts
from paper_figures.rate_by_context import highest
from paper_figures.records import Run, Study
from paper_figures.selection import panels
from paper_figures.shapes import kv_share, shapes
from paper_figures.stats import interval
from paper_figures.sweep_axes import context, model_count, rate


class NotRun(Exception):
    """The number cannot be computed. `expected` says that runs are there and should have given it."""

    def __init__(self, why: str, expected: bool = False) -> None:
        super().__init__(why)
        self.expected = expected


@dataclass(frozen=True)
class Measured:
    """A claim's number, the runs it rests on (none for a formula), and the command for a formula."""

    value: float
    runs: tuple[Run, ...] = ()
    command: str = ""


def kv_share_deviation(runs: Sequence[Run]) -> Measured:
    stated = facts("kv_share")
    deviations = [abs(kv_share(row["kv_heads"], stated["gpus"]) - row["share"]) for row in stated["rows"]]
    return Measured(max(deviations), command="python -m paper_figures kv_share")


def model_table_deviation(runs: Sequence[Run], column: str) -> Measured:
    """`ffn_b`: relative, of parameters in 1e9 as the paper rounds them; `attention_b` (in 1e9) and `ffn_share`: absolute."""
    known, deviations = shapes(), []
    for row in facts("model_table"):
        shape = known.get(row["model"])
        if shape and column == "ffn_b":
            deviations.append(abs(shape.ffn_elements / 1e9 / row[column] - 1))
        elif shape and column == "attention_b":
            deviations.append(abs(shape.attention_elements / 1e9 - row[column]))
        elif shape:
            deviations.append(abs(shape.ffn_share - row[column]))
    return Measured(max(deviations), command="python -m paper_figures model_table")


def ffn_gigabytes(runs: Sequence[Run], models: Sequence[str]) -> Measured:
    elements = sum(shapes()[name].ffn_elements for name in models)
    return Measured(2 * elements / 1e9, command="python -m paper_figures model_table")


def preemptions(runs: Sequence[Run], system: str) -> Measured:
    mine = _complete(runs, system)
    return Measured(sum(run.metric("preemptions") for run in mine), tuple(mine))


def metric_ratio(runs: Sequence[Run], metric: str, numerator: str, denominator: str) -> Measured:
    """The median over scenarios (loads) of the ratio of two systems' means over the seeds that both completed."""
    ratios, used = [], []
    for _, members in panels(runs, most=10**6):
        sides = _same_requests([_complete(members, system, required=False) for system in (numerator, denominator)])
        if all(sides):
            ratios.append(_mean(sides[0], metric) / _mean(sides[1], metric))
            used += [*sides[0], *sides[1]]
    if not ratios:
        raise NotRun(f"no scenario that both {numerator} and {denominator} completed", expected=True)
    return Measured(statistics.median(ratios), tuple(used))


def model_metric_ratio(
    runs: Sequence[Run], metric: str, model: str, rate_a_model_rps: float, numerator: str, denominator: str
) -> Measured:
    """The ratio of two systems' means of one model's metric at one rate, over the seeds that both completed."""
    at_rate = [run for run in runs if abs((rate(run) or 0) / max(1, model_count(run)) - rate_a_model_rps) < 1e-9]
    sides = _same_requests([_complete(at_rate, system) for system in (numerator, denominator)])
    if not all(sides):
        raise NotRun(f"no requests that both {numerator} and {denominator} were given", expected=True)
    means = [interval([run.metrics_by_model.get(model, {}).get(metric) for run in side]).mean for side in sides]
    return Measured(means[0] / means[1], (*sides[0], *sides[1]))


def ablation_speedup(runs: Sequence[Run], lanes: int, control: str) -> Measured:
    def cell(lanes: int, control: str) -> list[Run]:
        mine = [run for run in _complete(runs, "crosspool") if _has(run, lanes, control)]
        if not mine:
            raise NotRun(f"no complete run with lanes {lanes} and control {control}", expected=True)
        return mine

    with_it, without = cell(lanes, control), cell(1, "host")
    return Measured(_mean(with_it, "output_throughput") / _mean(without, "output_throughput"), (*with_it, *without))


def completed_share_gap(runs: Sequence[Run], numerator: str, denominator: str) -> Measured:
    """Completed share of one system less that of the other, at the longest context swept."""
    longest = max((context(run) or 0 for run in runs), default=0)
    at_longest = [run for run in runs if context(run) == longest]
    shares, used = [], []
    for system in (numerator, denominator):
        mine = _complete(at_longest, system)
        shares.append(sum(r.metric("completed") for r in mine) / sum(r.metric("num_requests") for r in mine))
        used += mine
    return Measured(shares[0] - shares[1], tuple(used))


def highest_rate(runs: Sequence[Run], system: str) -> Measured:
    """The highest rate served at the longest context swept (as in the exhibit rate_by_context)."""
    longest = max((context(run) or 0 for run in runs), default=0)
    mine = _complete([run for run in runs if context(run) == longest], system)
    return Measured(float(highest(mine)["rate_rps"]), tuple(mine))


def cold_share(runs: Sequence[Run], coldest_models: float) -> Measured:
    """Share of tokens of the coldest `coldest_models` of a run's models: of the run with most models."""
    complete = [run for run in runs if run.ok]
    if not complete:
        raise NotRun("no complete run", expected=bool(runs))
    run = max(complete, key=model_count)
    tokens = (run.requests["prompt_tokens"] + run.requests["output_tokens"]).groupby(run.requests["model"]).sum()
    ordered = tokens.reindex([model["name"] for model in run.config["models"]]).fillna(0).sort_values().to_numpy()
    return Measured(float(ordered[: round(coldest_models * len(ordered))].sum() / ordered.sum()), (run,))


def pooled_peak(runs: Sequence[Run], system: str) -> Measured:
    mine = _complete(runs, system)
    shares = []
    for run in mine:
        by_model = run.pages_by_model
        shares.append(by_model.sum(axis=1).max() / by_model.max().sum())
    return Measured(float(statistics.median(shares)), tuple(mine))


def usable_kv_ratio(runs: Sequence[Run], numerator: str, denominator: str) -> Measured:
    """What the best served model can use of all KV, of one system over the other, from the placements."""
    shares, used = [], []
    for system in (numerator, denominator):
        run = _complete(runs, system)[0]
        shares.append(max(usable(run).values()) / sum(device["kv_bytes"] for device in run.placement))
        used.append(run)
    return Measured(shares[0] / shares[1], tuple(used))


def overflow_ratio(runs: Sequence[Study], promised: float) -> Measured:
    """The worst over all plans of drawn overflow over promised, where the promise is nearest to `promised`."""
    ratios = []
    for study in runs:
        rows = study.rows
        rows = rows[(rows["check"] == "drawn") & (rows["fit"] == "plan")]
        row = rows.iloc[(rows["promised"] - promised).abs().argmin()]
        ratios.append(float(row["observed"] / row["promised"]))
    return Measured(max(ratios, key=lambda ratio: abs(ratio - 1)), tuple(runs))


def _complete(runs: Sequence[Run], system: str, required: bool = True) -> list[Run]:
    mine = [run for run in runs if run.named == system]  # not those that a setting makes another system of
    complete = [run for run in mine if run.ok]
    if required and not complete:
        failed = f"; {len(mine)} failed: {mine[0].reason}" if mine else ""
        raise NotRun(f"no complete run of {system}{failed}", expected=bool(mine))
    return complete


def _same_requests(sides: Sequence[Sequence[Run]]) -> list[list[Run]]:
    """Of each side the runs whose seed every side has: a load's seeds differ by more than systems sometimes do."""
    shared = set.intersection(*({run.seed for run in side} for side in sides))
    return [[run for run in side if run.seed in shared] for side in sides]


def _mean(runs: Sequence[Run], metric: str) -> float:
    return interval([run.metric(metric) for run in runs]).mean


def _has(run: Run, lanes: int, control: str) -> bool:
    return run.options.get("lanes") == lanes and run.options.get("control") == control


CHECKS: dict[str, Callable[..., Measured]] = {
    check.__name__: check
    for check in (
        kv_share_deviation,
        model_table_deviation,
        ffn_gigabytes,
        preemptions,
        metric_ratio,
        model_metric_ratio,
        ablation_speedup,
        completed_share_gap,
        highest_rate,
        cold_share,
        pooled_peak,
        usable_kv_ratio,
        overflow_ratio,
    )
}
