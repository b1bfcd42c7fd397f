"""Fit the forms' coefficients to measured rows, on one half of the shapes, and judge them on the other half.

A split never cuts through a shape: all sizes of a held-out shape are held out. Shapes are ordered by a hash of seed and
shape, within each variant, so that a split depends on nothing but its seed. Coefficients are fitted in logarithms, on the
logarithm of the ratio predicted/measured, with a soft L1 loss (measured rows hold a few wild outliers).
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from serving.cost.form import Form, Kernel
from serving.cost.forms import FORMS
from serving.cost.hardware import Hardware
from serving.cost.silicon import Rows, kernel_of

SPLIT_SEED = 0
DEFAULT_BOUNDS = (1e-4, 1e4)
NEGLIGIBLE = 1e-3  # a coefficient driven to its lower bound says that its term is not there


@dataclass(frozen=True)
class Fitted:
    """Coefficients of one variant of one operator on one card, and the rows they rest on."""

    operator: str
    variant: str
    coefficients: Mapping[str, float]
    rows: int


def shape_keys(rows: Rows) -> np.ndarray:
    """[rows] one string a shape."""
    parts = [rows.columns[name] for name in FORMS[rows.operator].split_columns]
    return np.array(["|".join(f"{value:g}" for value in values) for values in zip(*parts, strict=True)])


def fitting_half(rows: Rows, seed: int = SPLIT_SEED) -> np.ndarray:
    """[rows] bool: which rows belong to the fitting half of the shapes of their variant."""
    keys, half = shape_keys(rows), np.zeros(len(rows), dtype=bool)
    for variant in np.unique(rows.variant):
        mine = rows.variant == variant
        shapes = sorted(np.unique(keys[mine]), key=lambda key: _order(seed, key))
        half |= mine & np.isin(keys, shapes[: (len(shapes) + 1) // 2])
    return half


def _order(seed: int, key: str) -> str:
    return hashlib.sha256(f"{seed}:{key}".encode()).hexdigest()


def fit_rows(rows: Rows, hardware: Hardware, starts: int = 2) -> list[Fitted]:
    """Coefficients of every variant in `rows`, fitted to all of them."""
    fitted = []
    for variant in sorted(np.unique(rows.variant)):
        mine = rows.select(rows.variant == variant)
        kernel = kernel_of(rows.operator, variant)
        coefficients = fit_form(FORMS[rows.operator], mine.columns, mine.seconds, hardware, kernel, starts)
        fitted.append(Fitted(rows.operator, variant, coefficients, len(mine)))
    return fitted


def fit_form(
    form: Form,
    columns: Mapping[str, np.ndarray],
    seconds: np.ndarray,
    hardware: Hardware,
    kernel: Kernel,
    starts: int = 2,
) -> dict[str, float]:
    """The coefficients with the least loss over `starts` deterministic starting points, rounded to four digits."""
    from scipy.optimize import least_squares  # needed to fit, not to predict

    names = list(form.initial)
    low, high = np.log(np.array([form.bounds.get(name, DEFAULT_BOUNDS) for name in names])).T

    def residuals(point: np.ndarray) -> np.ndarray:
        return np.log(form.cost(dict(zip(names, np.exp(point), strict=True)), columns, hardware, kernel) / seconds)

    random, best = np.random.default_rng(SPLIT_SEED), None
    for start in range(starts):
        scale = [10.0 if start == 1 and name.endswith("_ns") else 1.0 for name in names]  # a start bound by serial work
        point = np.log([form.initial[name] for name in names]) + np.log(scale)
        point = np.clip(point + (random.normal(0, 1.0, len(names)) if start > 1 else 0.0), low + 1e-6, high - 1e-6)
        found = least_squares(residuals, point, bounds=(low, high), loss="soft_l1", f_scale=0.05, max_nfev=80)
        best = found if best is None or found.cost < best.cost else best
    found = dict(zip(names, np.exp(best.x), strict=True))
    return {name: float(f"{value:.4g}") if value > NEGLIGIBLE else 0.0 for name, value in found.items()}


def predict(
    fitted: Mapping[str, Mapping[str, float]],
    rows: Rows,
    hardware: Hardware,
    stands_for: Mapping[str, str] | None = None,
) -> np.ndarray:
    """[rows] predicted seconds, each row by the coefficients of its variant, or of the one that `stands_for` names for it.

    NaN where there are none. A stand-in is another program, so a floor that its measured host set is left out.
    """
    seconds = np.full(len(rows), np.nan)
    for variant in np.unique(rows.variant):
        source = variant if variant in fitted else (stands_for or {}).get(variant)
        if source in fitted:
            mine = rows.variant == variant
            columns = {name: values[mine] for name, values in rows.columns.items()}
            kernel = kernel_of(rows.operator, source)
            if source != variant:
                kernel = dataclasses.replace(kernel, host_floor=False)
            seconds[mine] = FORMS[rows.operator].cost(fitted[source], columns, hardware, kernel)
    return seconds
