"""The paper's Table 1 and the figures that follow from it, computed from published configs.

`PAPER_*` hold what the paper prints; tests compare the two to the printed digits. Llama-30B and Qwen3-32B appear in the
table only as dense contrasts: they are not served, so their shapes stand here as constants.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from serving.cost.facts import attention_plan, crossing_bytes, crossings_per_token, weight_bytes
from serving.errors import UserError
from serving.spec import ModelSpec, spec_from_config

PUBLISHED_DIRECTORY = Path(__file__).resolve().parents[1] / "checkpoints" / "published"
PAPER_MODELS = ("qwen3-30b-a3b", "glm-4.7-flash", "deepseek-v2-lite")
PAPER_WEIGHT_GPUS = 4


@dataclass(frozen=True)
class Row:
    """One row of Table 1. Parameters in billions (1e9)."""

    model: str
    layers: int
    ffn_billion: float
    attention_billion: float
    ffn_share: float  # of all weights, embeddings included

    def printed(self) -> tuple[str, int, str, str, str]:
        """The row as the paper prints it."""
        return (
            self.model,
            self.layers,
            f"{self.ffn_billion:.1f}",
            f"{self.attention_billion:.1f}",
            f"{100 * self.ffn_share:.1f}",
        )


PAPER_TABLE1 = (
    ("DeepSeek-V2-Lite", 27, "14.9", "0.4", "95.0"),
    ("Qwen3-30B-A3B", 48, "29.0", "0.9", "95.0"),
    ("GLM-4.7-Flash", 47, "28.3", "1.0", "94.5"),
    ("Llama-30B", 60, "21.5", "10.6", "66.0"),
    ("Qwen3-32B", 64, "25.2", "6.0", "76.8"),
)
PAPER_KV_KIB = {  # BF16 KV bytes a token, in KiB
    "mixtral-8x7b": 128.0,
    "deepseek-moe-16b": 224.0,
    "deepseek-v2-lite": 30.4,
    "glm-4.7-flash": 52.9,
    "qwen3-30b-a3b": 96.0,
}


@dataclass(frozen=True)
class DenseShape:
    """A dense decoder that is only counted, never served."""

    title: str
    layers: int
    hidden: int
    ffn_width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int

    def row(self) -> Row:
        ffn = self.layers * 3 * self.hidden * self.ffn_width
        attention = self.layers * self.hidden * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        everything = ffn + attention + 2 * self.vocab_size * self.hidden
        return Row(self.title, self.layers, ffn / 1e9, attention / 1e9, ffn / everything)


DENSE_SHAPES = (
    DenseShape("Llama-30B", 60, 6656, 17920, 52, 52, 128, 32000),  # arXiv 2302.13971, table 2
    DenseShape("Qwen3-32B", 64, 5120, 25600, 64, 8, 128, 151936),  # its config.json
)
SERVED_TITLES = {
    "deepseek-v2-lite": "DeepSeek-V2-Lite",
    "qwen3-30b-a3b": "Qwen3-30B-A3B",
    "glm-4.7-flash": "GLM-4.7-Flash",
}


def published_spec(name: str) -> ModelSpec:
    """The spec of a published checkpoint by name. Raises :class:`UserError` listing the known ones."""
    known = sorted(path.stem for path in PUBLISHED_DIRECTORY.glob("*.json"))
    if name not in known:
        raise UserError(f"unknown published model {name!r}; known: {', '.join(known)}")
    return spec_from_config(json.loads((PUBLISHED_DIRECTORY / f"{name}.json").read_text()), name)


def served_row(name: str) -> Row:
    """Table 1's row of a served model."""
    spec = published_spec(name)
    share = spec.ffn_elements / spec.total_elements
    return Row(SERVED_TITLES[name], spec.num_layers, spec.ffn_elements / 1e9, spec.attention_elements / 1e9, share)


def table1() -> tuple[Row, ...]:
    """Table 1, in the paper's order."""
    return (*(served_row(name) for name in SERVED_TITLES), *(shape.row() for shape in DENSE_SHAPES))


def check_figures() -> dict[str, float]:
    """Figures that follow from the configs for the paper's three models, in BF16 (GB = 1e9 bytes)."""
    specs = [published_spec(name) for name in PAPER_MODELS]
    weights = [weight_bytes(spec) for spec in specs]
    qwen = specs[0]
    ffn_gb = sum(part.ffn for part in weights) / 1e9
    figures = {
        f"kv_kib_per_token/{name}": published_spec(name).kv_bytes_per_token("bfloat16") / 1024 for name in PAPER_KV_KIB
    }
    return figures | {
        "weights_gb": sum(part.total for part in weights) / 1e9,
        "ffn_gb": ffn_gb,
        "ffn_gb_per_weights_gpu": ffn_gb / PAPER_WEIGHT_GPUS,
        "kv_side_gb": sum(part.kv_side for part in weights) / 1e9,
        "crossing_kib_per_token/qwen3-30b-a3b": crossing_bytes(qwen, 1) / 1024,
        "crossings_per_token/qwen3-30b-a3b": float(crossings_per_token(qwen)),
        **{
            f"kv_share_of_one_request/{heads}_kv_heads": attention_plan(heads, 4).kv_share_of_one_request
            for heads in (4, 2, 1)
        },
    }


def pingpong_batches(compute_s: float, transfer_s: float) -> float:
    """In-flight batches that hide transfers entirely: m >= 2 (1 + T_c / T_f) (MegaScale-Infer, section 4)."""
    return 2.0 * (1.0 + transfer_s / compute_s)


def format_table(rows: Sequence[Row]) -> str:
    """Table 1 beside the paper's print, one line a model."""
    paper: Mapping[str, tuple] = {row[0]: row for row in PAPER_TABLE1}
    lines = [f"{'model':<18}{'layers':>7}{'FFN B':>8}{'attn B':>8}{'FFN %':>8}   paper"]
    for row in rows:
        model, layers, ffn, attention, share = row.printed()
        verdict = "same" if paper[model] == row.printed() else f"differs: {paper[model][1:]}"
        lines.append(f"{model:<18}{layers:>7}{ffn:>8}{attention:>8}{share:>8}   {verdict}")
    return "\n".join(lines)
