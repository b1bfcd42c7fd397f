"""How far the cost model is from measured silicon: held-out shapes, in both forms, and a fit moved to the other card.

A cell is one operator on one card, all measured kernels pooled. `decode` cells carry the target (median 10 %, P90 25 %);
the rest is reported beside them. Errors are |predicted / measured - 1|.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from serving.cost.fit import SPLIT_SEED, fit_rows, fitting_half, predict
from serving.cost.fitted_set import FittedSet, fitted_set, shipped
from serving.cost.hardware import load_hardware
from serving.cost.silicon import CARDS, SOURCES, Rows, read_rows
from serving.cost.table import MeasuredTable

TARGET_MEDIAN, TARGET_P90 = 0.10, 0.25
DECODE_ROWS = 64  # rows of a GEMM, tokens of a routed FFN: up to this many is decode
TARGET_OPERATORS = ("moe", "decode_attention", "decode_mla", "gemm")
OTHER_CARD = {"a100-80gb": "h200", "h200": "a100-80gb"}

# Which kernel's coefficients stand for a kernel that the other card has no rows of.
STANDS_FOR = {
    "decode_attention": {
        "fa3/d64": "flash_attention/d128",
        "fa3/d128": "flash_attention/d128",
        "fa3/d192": "flash_attention/d128",
        "fa3/d256": "flash_attention/d128",
        "triton/d256": "flash_attention/d128",
        "triton/d512": "flash_attention/d128",
        "flash_attention/d128": "fa3/d128",
        "vllm_flash_attn/d128": "fa3/d128",
    },
    "decode_mla": {
        "flash_attention": "vllm_triton_mla",
        "vllm_triton_mla": "flash_attention",
        "default": "flash_attention",
    },
    "prefill_mla": {"flash_attention": "vllm_triton_mla", "vllm_triton_mla": "flash_attention"},
    "moe": {
        "sglang_flashinfer_cutlass_moe/t64": "sglang_fused_moe_triton/t64",
        "sglang_flashinfer_cutlass_moe/wide": "sglang_fused_moe_triton/wide",
    },
}


@dataclass(frozen=True)
class Errors:
    """Median and 90th percentile of the absolute relative error over `rows` rows."""

    rows: int
    median: float
    p90: float

    @property
    def within_target(self) -> bool:
        return self.median <= TARGET_MEDIAN and self.p90 <= TARGET_P90


@dataclass(frozen=True)
class Cell:
    """One operator on one card: errors on held-out shapes by three predictions."""

    card: str
    operator: str
    sizes: str  # decode | prefill | all
    variant: str  # a kernel, or "all" pooled
    roofline: Errors
    table: Errors
    moved: Errors  # the other card's coefficients with this card's datasheet

    @property
    def has_target(self) -> bool:
        return self.sizes == "decode" and self.variant == "all" and self.operator in TARGET_OPERATORS

    def record(self) -> dict[str, object]:
        verdict = self.roofline.within_target if self.has_target else None
        return asdict(self) | {"within_target": verdict}


def errors(predicted: np.ndarray, measured: np.ndarray) -> Errors:
    """Errors over the rows that have a prediction."""
    relative = np.abs(predicted / measured - 1.0)
    relative = relative[np.isfinite(relative)]
    if not len(relative):
        return Errors(0, float("nan"), float("nan"))
    return Errors(len(relative), float(np.median(relative)), float(np.quantile(relative, 0.9)))


def fit_card(directory: Path, card: str, seed: int = SPLIT_SEED, provenance: dict | None = None) -> FittedSet:
    """Coefficients of all operators of `card`, fitted to the fitting halves of its rows."""
    hardware, fits, sources = load_hardware(card), [], []
    for operator in SOURCES:
        rows = read_rows(directory, card, operator)
        fits += fit_rows(rows.select(fitting_half(rows, seed)), hardware)
        sources += rows.sources
    return fitted_set(card, fits, {**(provenance or {}), "split_seed": seed, "rows": "fitting half", "files": sources})


def check(directory: Path, seed: int = SPLIT_SEED, refit: bool = False) -> list[Cell]:
    """All cells of all cards. With the shipped seed and no `refit`, the shipped coefficients are judged as they are."""
    fresh = refit or seed != SPLIT_SEED
    sets = {card: fit_card(directory, card, seed) if fresh else shipped(card) for card in CARDS.values()}
    return [cell for card in sets for operator in SOURCES for cell in _cells(directory, card, operator, sets, seed)]


def _cells(directory: Path, card: str, operator: str, sets: dict[str, FittedSet], seed: int) -> Iterable[Cell]:
    rows, hardware = read_rows(directory, card, operator), load_hardware(card)
    half = fitting_half(rows, seed)
    held = rows.select(~half)
    own = sets[card].coefficients(operator)
    predictions = (
        predict(own, held, hardware),
        MeasuredTable(rows.select(half), hardware, own).predict(held),
        predict(sets[OTHER_CARD[card]].coefficients(operator), held, hardware, STANDS_FOR.get(operator)),
    )
    for sizes, chosen in _size_classes(held):
        for variant in ("all", *sorted({name.split("/")[0] for name in held.variant[chosen]})):
            mine = chosen & ((variant == "all") | np.char.startswith(held.variant.astype(str), variant))
            yield Cell(card, operator, sizes, variant, *(errors(p[mine], held.seconds[mine]) for p in predictions))


def _size_classes(rows: Rows) -> list[tuple[str, np.ndarray]]:
    counted = {"gemm": "m", "moe": "num_tokens"}.get(rows.operator)
    if counted:
        small = rows.columns[counted] <= DECODE_ROWS
        return [("decode", small), ("prefill", ~small)]
    sizes = {"decode": "decode", "prefill": "prefill"}.get(rows.operator.split("_")[0], "all")
    return [(sizes, np.ones(len(rows), dtype=bool))]


def format_cells(cells: Iterable[Cell], per_kernel: bool = False) -> str:
    """The table that `python -m serving.cost check` prints."""
    head = f"{'card':<10} {'operator':<18} {'sizes':<8} {'kernel':<30} {'rows':>6}"
    head += f"  {'roofline':>13}  {'table':>13}  {'moved':>13}"
    lines = [head, f"{'':<76}" + f"  {'med %  P90 %':>13}" * 3]
    for cell in cells:
        if cell.variant != "all" and not per_kernel:
            continue
        values = [f"{100 * e.median:6.1f} {100 * e.p90:6.1f}" for e in (cell.roofline, cell.table, cell.moved)]
        mark = ("  ok" if cell.roofline.within_target else "  MISS") if cell.has_target else ""
        kernel = "all kernels" if cell.variant == "all" else "  " + cell.variant
        lines.append(
            f"{cell.card:<10} {cell.operator:<18} {cell.sizes:<8} {kernel:<30} {cell.roofline.rows:>6}"
            + "".join(f"  {value:>13}" for value in values)
            + mark
        )
    lines.append(
        f"target at decode sizes, roofline form, held-out shapes: median {TARGET_MEDIAN:.0%}, P90 {TARGET_P90:.0%}"
    )
    lines.append(
        "table: the roofline corrected by log-linear interpolation of the fitting half (reported, not shipped)"
    )
    lines.append(
        "moved: the other card's coefficients with this card's datasheet; where that card has no rows of a kernel,"
    )
    lines.append(
        "       another kernel stands in (serving/cost/check.py, STANDS_FOR), so kernels differ as well as cards"
    )
    return "\n".join(lines)
