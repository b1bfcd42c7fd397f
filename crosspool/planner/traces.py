"""Reads what the planner's command is given: traces of lengths in two public formats, samples of a running pool."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from crosspool.planner.watch import ObservedDemand
from serving.errors import UserError

_SHARED = Path(__file__).parents[3] / "shared" / "traces"  # beside the repository


@dataclass(frozen=True, eq=False)
class LengthTrace:
    """Arrays [requests]; `arrivals_s` from the first request on, None where the trace has no times."""

    arrivals_s: np.ndarray | None
    prompt_tokens: np.ndarray
    output_tokens: np.ndarray


def find_trace(name: str) -> Path:
    """`name` as a path, or in the directory WORKLOAD_TRACES, or in ../shared/traces. Raises UserError that lists
    them."""
    places = [Path(name)]
    if directory := os.environ.get("WORKLOAD_TRACES"):
        places.append(Path(directory) / name)
    places.append(_SHARED / name)
    for place in places:
        if place.is_file():
            return place
    raise UserError(
        f"trace {name} is not there; set WORKLOAD_TRACES to its directory (looked at {', '.join(map(str, places))})"
    )


def read_trace(path: Path) -> LengthTrace:
    """Azure's CSV (TIMESTAMP, ContextTokens, GeneratedTokens) or Mooncake's JSON lines (timestamp in ms, *_length)."""
    try:
        if path.suffix == ".jsonl":
            table = pd.read_json(path, lines=True)
            times_s, prompt, output = table["timestamp"] / 1e3, table["input_length"], table["output_length"]
        else:
            table = pd.read_csv(path)
            stamps = pd.to_datetime(table["TIMESTAMP"], errors="coerce")
            times_s, prompt, output = (stamps - stamps.iloc[0]).dt.total_seconds(), *_azure(table)
    except KeyError as error:
        raise UserError(f"{path}: no column {error}; it must be one of the formats of the traces' README") from None
    except (ValueError, IndexError) as error:
        raise UserError(f"{path}: cannot be read as a trace ({error})") from None
    if not len(prompt):
        raise UserError(f"{path}: the trace is empty")
    arrivals = None if times_s.isna().any() else times_s.to_numpy(float)
    order = np.arange(len(prompt)) if arrivals is None else np.argsort(arrivals, kind="stable")
    ordered = None if arrivals is None else arrivals[order] - arrivals[order[0]]
    return LengthTrace(ordered, prompt.to_numpy(np.int64)[order], output.to_numpy(np.int64)[order])


def read_samples(path: Path) -> ObservedDemand:
    """Demand as sampled online: CSV with `time_s`, `pages` (in use) and, where requests queue, `waiting_pages`."""
    try:
        table = pd.read_csv(path)
        waiting = table["waiting_pages"].to_numpy(float) if "waiting_pages" in table else None
        return ObservedDemand.of(table["time_s"].to_numpy(float), table["pages"].to_numpy(float), waiting)
    except KeyError as error:
        raise UserError(
            f"{path}: no column {error}; columns are time_s, pages and, optionally, waiting_pages"
        ) from None
    except FileNotFoundError:
        raise UserError(f"{path}: no such file of samples") from None
    except (ValueError, UserError) as error:
        raise UserError(f"{path}: {error}") from None


def _azure(table: pd.DataFrame) -> tuple[pd.Series, pd.Series]:
    return table["ContextTokens"], table["GeneratedTokens"]
