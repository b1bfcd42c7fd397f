"""Which runs belong together: what varies among them, which variant of a system each is, which share a panel.

Nothing is told to an exhibit about a sweep. What was swept is read off the runs' own configurations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from paper_figures.records import Run

_NOT_A_SCENARIO = (
    "system.", "tune.", "timeline", "workload.seeds", "repeat", "tracking", "results_dir", "force", "experiment",
    "poll_interval_ms",
)  # fmt: skip
_SHORT = {
    "backend.name": "backend",
    "workload.": "",
    "arrivals.rate_rps": "rate",
    "popularity.alpha": "skew",
    "lengths.": "",
}


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as {dotted key: value}; lists of mappings stay as their length and names, which is what differs,
    other lists as their members."""
    if not isinstance(config, dict):
        if isinstance(config, list) and config and all(isinstance(item, dict) for item in config):
            return {prefix[:-1]: ",".join(str(item.get("name", item)) for item in config)} | {
                f"{prefix}{item.get('name', number)}.{key}": value
                for number, item in enumerate(config)
                for key, value in flatten(item).items()
            }
        return {prefix[:-1]: ", ".join(map(str, config)) if isinstance(config, list) else config}
    flat = {}
    for key, value in config.items():
        flat |= flatten(value, f"{prefix}{key}.")
    return flat


def differing(configs: Sequence[dict[str, Any]]) -> list[str]:
    """Keys whose value is not the same in all of `configs`, sorted."""
    keys = sorted({key for config in configs for key in config})
    return [key for key in keys if len({str(config.get(key)) for config in configs}) > 1]


def variants(runs: Sequence[Run], without: Iterable[str] = ()) -> dict[str, str]:
    """run id -> the system's name (:attr:`Run.named`), with the options that tell it from other runs of the
    same name where any but those `without` do."""
    labels = {}
    for name in {run.named for run in runs}:
        same = {run.run_id: flatten(run.options) for run in runs if run.named == name}
        keys = [key for key in differing(list(same.values())) if key not in without]
        for run_id, values in same.items():
            told = ", ".join(f"{key} {values.get(key)}" for key in keys)
            labels[run_id] = f"{name} ({told})" if told else name
    return labels


def scenario(run: Run, without: Iterable[str] = ()) -> dict[str, Any]:
    """What was asked of whichever system: the configuration without system, seed and bookkeeping."""
    dropped = (*_NOT_A_SCENARIO, *without)
    return {key: value for key, value in flatten(run.config).items() if not key.startswith(dropped)}


_TOLD = 2  # things that a label names, where that is enough


def panels(runs: Sequence[Run], without: Iterable[str] = (), most: int = 4) -> list[tuple[str, list[Run]]]:
    """`runs` by scenario, as (label, runs); the label says what differs, as much of it as tells scenarios apart. Of more than `most`,
    evenly spread ones."""
    scenarios = [scenario(run, without) for run in runs]
    keys = differing(scenarios)
    groups: dict[tuple, list[Run]] = {}
    for run, content in zip(runs, scenarios, strict=True):
        groups.setdefault(tuple(content.get(key) for key in keys), []).append(run)
    ordered = sorted(groups, key=lambda values: [sortable(value) for value in values])
    if len(ordered) > most:
        ordered = [ordered[round(i * (len(ordered) - 1) / (most - 1))] for i in range(most)]
    told = range(_TOLD, max(_TOLD, len(keys)) + 2)
    labels = ([_label(keys, values, most) for values in ordered] for most in told)
    distinct = next(shown for shown in labels if len(set(shown)) == len(shown))
    return [(label, groups[values]) for label, values in zip(distinct, ordered, strict=True)]


def fullest(runs: Sequence[Run]) -> list[Run]:
    """The runs of one scenario: of those that most systems were asked for, the one with most runs, of these the last."""
    labels = variants(runs)
    scenarios = [members for _, members in panels(runs, most=len(runs))]
    return max(reversed(scenarios), key=lambda members: (len({labels[run.run_id] for run in members}), len(members)))


def sortable(value: Any) -> tuple:
    """A key that sorts numbers before words, each by its own order."""
    return (0, value, "") if isinstance(value, int | float) else (1, 0, str(value))


def _label(keys: Sequence[str], values: Sequence[Any], most: int) -> str:
    """The first `most` of what differs; where that is more than there are, all of it as it is. Of lists that differ their
    members' own settings say nothing more, and of models their number has room where their names have not."""
    if most > max(_TOLD, len(keys)):
        return ", ".join(f"{short_key(key)} {value}" for key, value in zip(keys, values, strict=True))
    told = [
        (key, value) for key, value in zip(keys, values, strict=True) if not any(key.startswith(f"{k}.") for k in keys)
    ]
    told.sort(key=lambda one: one[0] == "backend.calibration")  # a file's name says least
    return ", ".join(
        f"{value.count(',') + 1} models" if key == "models" else f"{short_key(key)} {value}"
        for key, value in told[:most]
    )


def short_key(key: str) -> str:
    """A configuration key as a figure's title has room for it."""
    for long, short in _SHORT.items():
        key = key.replace(long, short)
    return key


def by_cell(
    runs: Sequence[Run], x: Callable[[Run], Any], without: Iterable[str] = ()
) -> dict[tuple[str, Any], list[Run]]:
    """(variant, x) -> its runs, which differ in their seed. Options `without` tell no variants apart."""
    labels = variants(runs, without)
    cells: dict[tuple[str, Any], list[Run]] = {}
    for run in runs:
        cells.setdefault((labels[run.run_id], x(run)), []).append(run)
    return cells
