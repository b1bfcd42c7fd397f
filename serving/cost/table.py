"""A measured table with log-linear interpolation, laid over a roofline form.

What is interpolated is the logarithm of measured over predicted by the form: within a shape along the logarithms of its
size columns (tokens; batch and context), and for a shape that was never measured, between the nearest measured shapes of
the same variant. Outside the measured sizes the last ratio is kept, so the form alone carries the extrapolation. Tables are
built from rows at hand (a calibration of this machine, or the silicon data where it lies); they are never shipped.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence

import numpy as np

from serving.cost.fit import predict
from serving.cost.forms import FORMS
from serving.cost.hardware import Hardware
from serving.cost.silicon import Rows

NEIGHBOURS = 4


class MeasuredTable:
    """Rows of one operator, ready to correct the form's predictions."""

    def __init__(self, rows: Rows, hardware: Hardware, fitted: Mapping[str, Mapping[str, float]]):
        self.form, self.hardware, self.fitted = FORMS[rows.operator], hardware, fitted
        ratios = np.log(rows.seconds / predict(fitted, rows, hardware))
        self.grids: dict[str, dict[tuple[float, ...], object]] = {}
        shapes, sizes = self._logs(rows, self.form.shape), self._logs(rows, self.form.size)
        collected: dict = {}
        for variant, shape, size, ratio in zip(rows.variant, shapes, sizes, ratios, strict=True):
            if np.isfinite(ratio):
                collected.setdefault(variant, {}).setdefault(tuple(shape), {}).setdefault(tuple(size), []).append(ratio)
        for variant, by_shape in collected.items():
            self.grids[variant] = {shape: _tree(points) for shape, points in by_shape.items()}

    @staticmethod
    def _logs(rows: Rows, names: Sequence[str]) -> np.ndarray:
        """[rows, names] logarithms, with room for columns that may be zero (a window size)."""
        return np.log2(1e-3 + np.stack([rows.columns[name].astype(float) for name in names], axis=1))

    def predict(self, rows: Rows) -> np.ndarray:
        """[rows] seconds: the form's, times the interpolated ratio."""
        shapes, sizes = self._logs(rows, self.form.shape), self._logs(rows, self.form.size)
        corrections = np.zeros(len(rows))
        near: dict = {}
        for index, (variant, shape, size) in enumerate(zip(rows.variant, shapes, sizes, strict=True)):
            key = (variant, tuple(shape))
            if key not in near:
                near[key] = self._nearest(*key)
            corrections[index] = sum(weight * _interpolate(tree, size) for tree, weight in near[key])
        return predict(self.fitted, rows, self.hardware) * np.exp(corrections)

    def correction(self, variant: str, columns: Mapping[str, float]) -> float:
        """The interpolated ratio of measured over predicted at one point; 1 where the variant was never measured."""
        shape, size = (
            [math.log2(1e-3 + columns[name]) for name in names] for names in (self.form.shape, self.form.size)
        )
        return math.exp(sum(weight * _interpolate(tree, size) for tree, weight in self._nearest(variant, tuple(shape))))

    def _nearest(self, variant: str, shape: tuple[float, ...]) -> list[tuple[object, float]]:
        """(tree, weight) of the measured shapes to interpolate between: the shape itself where it was measured."""
        grid = self.grids.get(variant)
        if not grid:
            return []
        if shape in grid:
            return [(grid[shape], 1.0)]
        known = list(grid)
        distances = np.linalg.norm(np.array(known) - np.array(shape), axis=1)
        nearest = np.argsort(distances, kind="stable")[:NEIGHBOURS]
        weights = 1.0 / distances[nearest] ** 2
        return [(grid[known[i]], w) for i, w in zip(nearest, weights / weights.sum(), strict=True)]


def _tree(points: Mapping[tuple[float, ...], list[float]]) -> object:
    """Nested sorted (keys, subtrees), one level a size column; a leaf is the mean logarithm of its ratios."""
    if () in points:
        return float(np.mean(points[()]))
    keys = sorted({point[0] for point in points})
    return keys, [_tree({p[1:]: v for p, v in points.items() if p[0] == key}) for key in keys]


def _interpolate(tree, point: Sequence[float]) -> float:
    """Linear between the two keys around each coordinate, constant outside."""
    if not isinstance(tree, tuple):
        return tree
    keys, subtrees = tree
    right = bisect.bisect_left(keys, point[0])
    if right < len(keys) and keys[right] == point[0] or right == 0:
        return _interpolate(subtrees[min(right, len(keys) - 1)], point[1:])
    if right == len(keys):
        return _interpolate(subtrees[-1], point[1:])
    share = (point[0] - keys[right - 1]) / (keys[right] - keys[right - 1])
    low, high = _interpolate(subtrees[right - 1], point[1:]), _interpolate(subtrees[right], point[1:])
    return low + share * (high - low)
