"""The text that `python -m workloads describe` prints: what was expected beside what is there."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from workloads.columnar import Trace
from workloads.known import KnownFile
from workloads.sources import SourceRows
from workloads.statistics import correlation, describe, gap_cv, length_statistics

_MODELS_SHOWN = 12


def trace_report(trace: Trace, window_s: float) -> str:
    """Statistics of a trace, a line each, expected against measured."""
    found, made = describe(trace, window_s), trace.made
    promised: Mapping[str, Any] = made.get("expected") or {}
    title = (
        f"{found['requests']:,} requests in {trace.duration_s:g} s to {len(trace.models)} models; "
        f"digest {trace.digest[:16]}"
    )
    lines = [
        title,
        *([made["assignment"]] if "assignment" in made else []),
        "",
        _row("", "expected", "measured", "difference", "std errors"),
        _compared("rate, req/s", promised.get("rate_rps"), found["rate_rps"], promised.get("rate_std_rps")),
        _compared("CV of gaps", promised.get("gap_cv"), found["gap_cv"]),
        _compared("CV of gaps, top model", None, found["model_gap_cv"]),
    ]
    for part in ("prompt_tokens", "output_tokens"):
        law = promised.get(part) or {}
        for key in ("mean", "p50", "p90", "p95", "p99"):
            error = law["std"] / max(len(trace), 1) ** 0.5 if law and key == "mean" else None
            lines.append(_compared(f"{part.replace('_', ' ')} {key}", law.get(key), found[part][key], error))
    lines += [
        _compared("context tokens, largest", None, found["context_tokens"]["max"]),
        _compared("correlation of lengths", None, found["correlation"]),
        _compared(f"models active in {window_s:g} s", found["active_if_poisson"], found["active_models"]["mean"]),
        _compared("tokens to coldest 90 % of models", None, found["cold_token_share"]),
        "",
        *_shares(trace, found["shares"]),
        "",
        f"clipped to a model's context: {made.get('clipped', 0):,} requests, {made.get('clipped_tokens', 0):,} tokens",
    ]
    lines += [f"cut off by {part} limits: {share:.3%} of the law" for part, share in made.get("cut_share", {}).items()]
    if made.get("injected"):
        lines.append(f"injected long requests: {made['injected']:,} (not in what was expected)")
    if made.get("source"):
        lines.append("source: " + ", ".join(f"{key} {value}" for key, value in made["source"].items()))
    return "\n".join(lines)


def source_report(rows: SourceRows, known: KnownFile | None) -> str:
    """Statistics of a real trace; for a published one, beside those that a reader must find."""
    name = "" if known is None else f"; published: {known.origin}, {known.licence}"
    lines = [", ".join(f"{key} {value}" for key, value in rows.identity.items()) + name, ""]
    lines.append(_row("", "published", "read", "difference"))
    for key, value in source_statistics(rows).items():
        lines.append(_compared(key.replace("_", " "), getattr(known, key) if known else None, value))
    return "\n".join(lines)


def source_statistics(rows: SourceRows) -> dict[str, float]:
    """What :class:`KnownFile` states, as read: named alike."""
    found: dict[str, float] = {"rows": len(rows.prompt_tokens)}
    if rows.arrival_s is not None:
        found |= {"span_s": float(rows.arrival_s[-1] - rows.arrival_s[0]), "gap_cv": gap_cv(rows.arrival_s)}
    for part, tokens in (("prompt", rows.prompt_tokens), ("output", rows.output_tokens)):
        statistics = length_statistics(tokens)
        found |= {f"{part}_{key}": statistics[key] for key in ("mean", "p50", "p99", "max")}
    return found | {"correlation": correlation(rows.prompt_tokens, rows.output_tokens)}


def _shares(trace: Trace, measured: np.ndarray) -> list[str]:
    promised = trace.made.get("expected_shares") or {}
    binomial = (trace.made.get("expected") or {}).get("independent_choices", False)
    order = np.argsort(-measured, kind="stable")[:_MODELS_SHOWN]
    lines = [_row("share of requests, most asked first", "expected", "measured", "difference", "std errors")]
    for index in order:
        name = trace.models[index].name
        share = promised.get(name)
        error = (share * (1 - share) / max(len(trace), 1)) ** 0.5 if share is not None and binomial else None
        lines.append(_compared(name, share, float(measured[index]), error))
    rest = len(trace.models) - len(order)
    return lines + ([f"... and {rest} more"] if rest else [])


def _compared(name: str, promised: float | None, found: float, error: float | None = None) -> str:
    """A line; `error` is the standard error of what is found, were it drawn from what was promised."""
    cells = ["-" if promised is None else _text(promised), _text(found)]
    if promised is not None and not math.isnan(found):
        cells.append(f"{found / promised - 1:+.1%}" if promised else "")
        cells.append(f"{(found - promised) / error:+.1f}" if error else "")
    return _row(name, *cells)


def _row(name: str, *cells: str) -> str:
    return (f"{name:<36}" + "".join(f"{cell:>12}" for cell in cells)).rstrip()


def _text(value: float) -> str:
    if math.isnan(value):
        return "undefined"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
