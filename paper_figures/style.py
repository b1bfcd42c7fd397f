"""One look for each system, everywhere: colour, marker and line, told apart without colour too.

Colours are those of Okabe and Ito (2008), which people with the common colour-vision deficiencies tell apart. Sizes suit a
column of a two-column paper.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import matplotlib
from matplotlib.axis import Axis
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

matplotlib.use("Agg")

COLUMN_IN = 3.33  # width of one column of the usual two-column templates
DPI = 200


@dataclass(frozen=True)
class Look:
    """How one system is drawn."""

    label: str
    color: str
    marker: str
    line: str | tuple

    @property
    def plot(self) -> dict:
        """Keyword arguments for `Axes.plot`."""
        return {"label": self.label, "color": self.color, "linestyle": self.line}


_LOOKS = {
    "crosspool": Look("CrossPool", "#0072B2", "o", "-"),
    "crosspool-one-batch": Look("CrossPool, one batch a model", "#0072B2", "d", (0, (2, 1))),
    "static": Look("Static partition", "#E69F00", "s", "--"),
    "static-searched": Look("Static, searched", "#E69F00", "p", (0, (4, 1, 1, 1))),
    "elastic": Look("Elastic (kvcached)", "#D55E00", "^", "-."),
    "elastic-mps": Look("Elastic through MPS", "#D55E00", "<", (0, (1, 1))),
    "elastic-cap": Look("Elastic, capped", "#D55E00", "2", ":"),
    "elastic-placement": Look("Elastic + placement", "#56B4E9", "P", (0, (3, 1))),
    "elastic-placement-cap": Look("Elastic + placement, capped", "#56B4E9", "3", ":"),
    "quota": Look("Quota (MuxServe)", "#CC79A7", "v", (0, (5, 1, 1, 1, 1, 1))),
    "quota-cap": Look("Quota, capped", "#CC79A7", "1", ":"),
    "swap": Look("Swap", "#009E73", "D", "--"),
    "swap-token": Look("Swap by token", "#009E73", "*", "-."),
    "swap-zero-cost": Look("Swap at no cost (bound)", "#7F7F7F", "x", ":"),
}
_SPARE_COLORS = ("#000000", "#56B4E9", "#CC79A7", "#7F7F7F")
_SPARE_MARKERS = ("X", "<", ">", "h")
_SPARE_LINES = ((0, (1, 1)), (0, (5, 3)), (0, (3, 1, 1, 1)), (0, (7, 2)))

MODEL_COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#7F7F7F")
MODEL_HATCHES = ("", "///", "...", "\\\\\\", "xxx", "ooo", "+++", "---")
PERCENTILE_LINES = {"p50": ":", "p95": "--", "p99": "-"}


def look(system: str) -> Look:
    """The look of `system`; one that no table here names gets its own, the same in every figure."""
    if system in _LOOKS:
        return _LOOKS[system]
    index = zlib.crc32(system.encode())
    return Look(system, _SPARE_COLORS[index % 4], _SPARE_MARKERS[index // 4 % 4], _SPARE_LINES[index // 16 % 4])


def order(systems) -> list[str]:
    """`systems` without repeats in the order every legend has: those named here first, then by name."""
    known = list(_LOOKS)
    return sorted(set(systems), key=lambda name: (known.index(name) if name in known else len(known), name))


def short_number(value: float) -> str:
    """`value` in few characters: 20k for 20000, so that decades fit beside each other in half a column."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= 10 * size or (abs(value) >= size and value % size == 0):
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def plain_log_ticks(axis: Axis) -> None:
    """Label a logarithmic axis with plain numbers, and at more than powers of ten where it spans few of them."""
    low, high = axis.get_view_interval()
    ratio = high / low if low > 0 else float("inf")
    steps = (1, 1.5, 2, 3, 4, 5, 7) if ratio < 6 else (1, 2, 5) if ratio < 100 else (1,)
    axis.set_major_locator(LogLocator(base=10, subs=steps, numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
    axis.set_minor_formatter(NullFormatter())


RC = {
    "font.family": "DejaVu Sans",
    "font.size": 7,
    "axes.titlesize": 7,
    "axes.labelsize": 7,
    "xtick.labelsize": 6,
    "ytick.labelsize": 6,
    "legend.fontsize": 6,
    "legend.frameon": False,
    "legend.handlelength": 2.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.5,
    "axes.axisbelow": True,
    "axes.linewidth": 0.6,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    "hatch.linewidth": 0.5,
    "pdf.fonttype": 42,  # whole glyph outlines: editable, and what venues ask for
    "ps.fonttype": 42,
    "figure.dpi": DPI,
    "savefig.dpi": DPI,
    "figure.constrained_layout.use": True,
}
