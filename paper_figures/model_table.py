"""Parameters of the attention and FFN halves of the paper's models (its Table 1), from their shapes, and KV a token."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from paper_figures.exhibit import TableExhibit
from paper_figures.paper import facts
from paper_figures.records import Run
from paper_figures.shapes import shapes


class ModelTable(TableExhibit):
    name = "model_table"
    title = "FFN and attention parameters by model, from published configurations, beside what the paper states"
    paper = "Table 1"
    needs_runs = False

    def rows(self, runs: Sequence[Run]) -> pd.DataFrame:
        stated = {row["model"]: row for row in facts("model_table")}
        known = shapes()
        return pd.DataFrame(
            _row(name, known.get(name), stated.get(name, {})) for name in dict.fromkeys([*stated, *known])
        )


def _row(name: str, shape, stated: dict) -> dict[str, object]:
    nan = float("nan")
    return {
        "model": name,
        "layers": shape.layers if shape else stated["layers"],
        "FFN (1e9)": shape.ffn_elements / 1e9 if shape else nan,
        "paper FFN": stated.get("ffn_b", nan),
        "attention (1e9)": shape.attention_elements / 1e9 if shape else nan,
        "paper attention": stated.get("attention_b", nan),
        "FFN share": shape.ffn_share if shape else nan,
        "paper share": stated.get("ffn_share", nan),
        "KV a token (KiB, BF16)": shape.kv_bytes_per_token / 1024 if shape else nan,
    }
