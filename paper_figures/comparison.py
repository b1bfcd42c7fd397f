"""All systems on the same traces, memory and machine: a table, one by model, and curves. Where CrossPool loses is marked.

The three show the same cells: a rate, a skew and a system, each the mean over seeds. A system *beats* CrossPool in a metric
where its mean is better by more than 1 %. Seeds are traces that both served, so they are compared pair by pair: the mark `*`
says that the 95 % interval of the ratio is on one side of 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from paper_figures import stats, style
from paper_figures.exhibit import FigureExhibit, NothingToDraw, TableExhibit, legend_above
from paper_figures.records import Run
from paper_figures.selection import panels, variants
from paper_figures.sweep_axes import RATE_KEYS, SKEW_KEYS, rate, skew

OURS = "crosspool"
_LATENCIES = {
    f"{name} {shown} (ms)": f"{percentile}_{latency}"
    for latency, name in (("ttft_ms", "TTFT"), ("itl_ms", "TBT"))
    for percentile, shown in (("median", "p50"), ("p95", "p95"), ("p99", "p99"))
}
_COUNTS = ("rejected", "failed", "swaps", "preemptions")
_JUDGED = ("TTFT p95 (ms)", "TBT p99 (ms)", "goodput (req/s)")
_NOTICEABLE = 0.01  # relative; less is not told as better or worse


@dataclass(frozen=True)
class Cell:
    """The runs of one system at one rate and skew, which differ in their seed or repeat one another."""

    rate_rps: float
    skew: float
    system: str
    runs: tuple[Run, ...]

    @property
    def ran(self) -> list[Run]:
        return [run for run in self.runs if run.ok]

    def by_seed(self, value: Callable[[Run], float]) -> dict[tuple[str, int], float]:
        return {(run.seed, run.repeat): value(run) for run in self.ran}

    def over_seeds(self, value: Callable[[Run], float]) -> stats.Interval:
        return stats.interval(list(self.by_seed(value).values()))


def cells(runs: Sequence[Run]) -> list[Cell]:
    """The cells of `runs`, by rate, skew and the order that systems have in every legend."""
    labels = variants(runs)
    found: dict[tuple[float, float, str], list[Run]] = {}
    for run in runs:
        found.setdefault((rate(run), skew(run), labels[run.run_id]), []).append(run)
    rank = {name: number for number, name in enumerate(style.order(labels.values()))}
    ordered = sorted(found, key=lambda key: (key[1], key[0], rank[key[2]]))
    return [Cell(*key, tuple(found[key])) for key in ordered]


def compared(name: str, runs: Sequence[Run]) -> list[Run]:
    """Of `runs`, the most that differ in system, rate, skew and seed alone. Raises :class:`NothingToDraw`."""
    placed = [run for run in runs if rate(run) is not None and skew(run) is not None]
    groups = [members for _, members in panels(placed, without=(*RATE_KEYS, *SKEW_KEYS), most=10**6)]
    members = max(groups, key=len, default=[])
    labels = variants(members)
    ran = {labels[run.run_id] for run in members if run.ok}
    if OURS not in ran or len(ran) < 2:
        raise NothingToDraw(f"{name}: needs complete runs of {OURS} and of another system under the same workload")
    return members


def better(title: str, other: Mapping[str, float], ours: Mapping[str, float]) -> str:
    """`TBT p99 0.71x*` where `other` beats `ours` in the metric `title`, both by seed, else nothing."""
    pairs = [(other[seed], ours[seed]) for seed in other.keys() & ours.keys()]
    pairs = [(theirs, own) for theirs, own in pairs if theirs > 0 and own > 0]  # no NaN either
    if not pairs:
        return ""
    ratio = sum(theirs for theirs, _ in pairs) / sum(own for _, own in pairs)
    sign = -1 if title.endswith("(ms)") else 1  # latencies are better where they are less
    if sign * (ratio - 1) <= _NOTICEABLE:
        return ""
    logs = stats.interval([sign * math.log(theirs / own) for theirs, own in pairs])
    return f"{title.partition(' (')[0]} {ratio:.2f}x{'*' if logs.low > 0 else ''}"  # one seed: NaN, and so no mark


def _metrics() -> dict[str, Callable[[Run], float]]:
    named = {**_LATENCIES, "goodput (req/s)": "request_goodput"}
    return {title: lambda run, key=key: run.metric(key) for title, key in named.items()}


def _worst_model(run: Run) -> float:
    values = [found.get("p99_itl_ms") for found in run.metrics_by_model.values()]
    return max((value for value in values if value is not None), default=float("nan"))


def _against_ours(runs: Sequence[Run]) -> Iterator[tuple[Cell, dict[str, stats.Interval], dict[str, str]]]:
    """Every cell, its metrics, and by judged metric how it beats CrossPool's cell under the same load."""
    metrics = _metrics()
    found = cells(runs)
    ours = {(cell.rate_rps, cell.skew): cell for cell in found if cell.system == OURS}
    for cell in found:
        base = ours.get((cell.rate_rps, cell.skew))
        beaten = {}
        if base is not None and cell is not base:
            beaten = {
                title: better(title, cell.by_seed(metrics[title]), base.by_seed(metrics[title])) for title in _JUDGED
            }
        yield cell, {title: cell.over_seeds(value) for title, value in metrics.items()}, beaten


class Comparison(TableExhibit):
    name = "comparison"
    title = (
        "All systems under the same traces and total memory (mean over seeds). The last column says where a system beats "
        "CrossPool, by its value over CrossPool's; * where the 95 % interval of that ratio, trace by trace, is on one side of 1"
    )

    def select(self, runs: Sequence[Run]) -> list[Run]:
        return compared(self.name, runs)

    def rows(self, runs: Sequence[Run]) -> pd.DataFrame:
        return pd.DataFrame(self._row(*found) for found in _against_ours(runs))

    @staticmethod
    def _row(cell: Cell, values: dict[str, stats.Interval], beaten: dict[str, str]) -> dict[str, object]:
        counts = {name: cell.over_seeds(lambda run, name=name: run.metric(name)).mean for name in _COUNTS}
        if not cell.ran:
            told = "could not run"
        elif cell.system == OURS:
            told = ""
        else:
            told = ", ".join(filter(None, beaten.values())) or "nothing"
        return {
            "rate": cell.rate_rps, "skew": cell.skew, "system": cell.system, "n": len(cell.ran),
            **{title: found.mean for title, found in values.items() if title in _LATENCIES},
            "worst model's TBT p99 (ms)": cell.over_seeds(_worst_model).mean,
            "goodput (req/s)": values["goodput (req/s)"].mean,
            **counts,
            "beats CrossPool in": told,
        }  # fmt: skip


class ComparisonByModel(TableExhibit):
    name = "comparison_by_model"
    title = "TTFT and TBT of each model in the comparison of all systems (mean over seeds)"

    def select(self, runs: Sequence[Run]) -> list[Run]:
        return compared(self.name, runs)

    def rows(self, runs: Sequence[Run]) -> pd.DataFrame:
        models = sorted({model for run in runs for model in run.metrics_by_model})
        return pd.DataFrame(
            {
                "rate": cell.rate_rps, "skew": cell.skew, "system": cell.system, "model": model,
                **{
                    title: cell.over_seeds(lambda run, m=model, k=key: run.metrics_by_model.get(m, {}).get(k)).mean
                    for title, key in {"requests": "num_requests", "rejected": "rejected", **_LATENCIES}.items()
                },
            }
            for cell in cells(runs) if cell.ran
            for model in models
        )  # fmt: skip


class ComparisonByRate(FigureExhibit):
    """A row of plots a skew, a column a metric. A ring is a cell in which a system beats CrossPool."""

    name = "comparison_by_rate"
    title = (
        "All systems under the same traces and total memory against the offered rate, by skew of popularity (mean over seeds); "
        "a ring marks a cell in which a system beats CrossPool"
    )

    def select(self, runs: Sequence[Run]) -> list[Run]:
        return compared(self.name, runs)

    def rows(self, runs: Sequence[Run]) -> pd.DataFrame:
        return pd.DataFrame(
            {
                "skew": cell.skew, "system": cell.system, "rate": cell.rate_rps, "metric": title,
                "mean": values[title].mean, "ci_low": values[title].low, "ci_high": values[title].high,
                "n": values[title].n, "beats_crosspool": bool(beaten.get(title)),
            }
            for cell, values, beaten in _against_ours(runs)
            for title in _JUDGED
        )  # fmt: skip

    def figure_size_in(self, rows: pd.DataFrame) -> tuple[float, float]:
        legend_rows = -(-rows["system"].nunique() // 5)
        return 2 * style.COLUMN_IN + 0.34, 0.35 + 0.13 * legend_rows + 1.5 * rows["skew"].nunique()

    def draw(self, rows: pd.DataFrame, figure: Figure) -> None:
        skews, rates = sorted(rows["skew"].unique()), sorted(rows["rate"].unique())
        systems = list(dict.fromkeys(rows["system"]))
        grid = figure.subplots(len(skews), len(_JUDGED), squeeze=False, sharex=True, sharey="col")
        for line, alpha in zip(grid, skews, strict=True):
            for axis, title in zip(line, _JUDGED, strict=True):
                shown = rows[(rows["skew"] == alpha) & (rows["metric"] == title)]
                for number, system in enumerate(systems):  # side by side: equal values must not hide one another
                    line_of = shown[(shown["system"] == system) & (shown["n"] > 0)].sort_values("rate")
                    places = [rates.index(x) + 0.6 * ((number + 0.5) / len(systems) - 0.5) for x in line_of["rate"]]
                    self._draw_line(axis, places, line_of, style.look(system))
                axis.set_title(f"{title}, skew {alpha:g}")
        for column, title in zip(grid.T, _JUDGED, strict=True):
            if title.endswith("(ms)"):
                column[0].set_yscale("log")
                low, high = column[0].get_ylim()
                pad = (high / low) ** 0.06  # whole markers, rings included, at both ends
                column[0].set_ylim(low / pad, high * pad)
                for axis in column:
                    style.plain_log_ticks(axis.yaxis)
            else:
                column[0].set_ylim(0, 1.08 * column[0].get_ylim()[1])
            column[-1].set_xticks(range(len(rates)), [f"{x:g}" for x in rates])
            column[-1].set_xlim(-0.5, len(rates) - 0.5)
            column[-1].set_xlabel("Offered rate (req/s)")
        legend_above(figure, list(grid.flat), columns=5)

    @staticmethod
    def _draw_line(axis: Axes, places: Sequence[float], line: pd.DataFrame, look: style.Look) -> None:
        axis.plot(places, line["mean"], marker=look.marker, **look.plot)
        won = [(x, y) for x, y, beats in zip(places, line["mean"], line["beats_crosspool"], strict=True) if beats]
        axis.plot(
            [x for x, _ in won], [y for _, y in won], linestyle="", marker="o", markersize=7, markerfacecolor="none",
            markeredgecolor="black", markeredgewidth=0.6,
        )  # fmt: skip
