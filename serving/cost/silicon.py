"""Kernel latencies that others measured on real cards, read where they lie (never copied): rows for fitting and checking.

The directory is `$SILICON_DIR`, or `../shared/silicon` beside the repository. Rows of one operator on one card become
columns (NumPy arrays) with names that the forms know, and a `variant` a row: the measured kernel, and where one kernel is
really several (a GEMV at one row, an attention kernel compiled for a head width), which of them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from serving.cost.form import Kernel
from serving.cost.forms import FORMS
from serving.cost.routing import distinct_experts
from serving.errors import UserError

CARDS = {"a100_80gb": "a100-80gb", "h200": "h200"}  # file prefix -> hardware name
SOURCES = {  # operator -> files that hold its rows
    "gemm": ("gemm",),
    "moe": ("moe",),
    "decode_attention": ("decode_attention",),
    "decode_mla": ("decode_mla",),
    "prefill_attention": ("prefill_attention",),
    "prefill_mla": ("prefill_mla",),
    "collective": ("allreduce", "nccl"),
}

# How each measured kernel cuts its work. FlashAttention-3 never splits four KV blocks or fewer and fills the card once with
# equal parts; vLLM's Triton MLA uses four parts and 16 heads a block; TensorRT-LLM's MLA on Ampere does not split at all.
KERNELS = {
    ("decode_attention", "flash_attention"): Kernel(min_blocks=4, kv_block=64, padded_kv=True),
    ("decode_attention", "fa3"): Kernel(min_blocks=4),
    ("decode_attention", "vllm_flash_attn"): Kernel(min_blocks=1),
    ("decode_attention", "triton"): Kernel(max_splits=8),
    ("decode_mla", "vllm_triton_mla"): Kernel(fixed_splits=4, group_heads=16, kv_block=64, host_floor=True),
    ("decode_mla", "default"): Kernel(fixed_splits=1, blocks_per_group=2, kv_block=64, padded_kv=True),
    ("decode_mla", "flash_attention"): Kernel(whole_waves=False),
    ("prefill_mla", "vllm_triton_mla"): Kernel(host_floor=True),
    ("collective", "vLLM_custom_eager"): Kernel(host_floor=True),
}


@dataclass(frozen=True)
class Rows:
    """Measured rows of one operator on one card."""

    card: str
    operator: str
    columns: dict[str, np.ndarray]
    variant: np.ndarray  # [rows] str
    seconds: np.ndarray  # [rows]
    sources: tuple[dict[str, object], ...]  # file, sha256, rows

    def __len__(self) -> int:
        return len(self.seconds)

    def select(self, mask: np.ndarray) -> Rows:
        columns = {name: values[mask] for name, values in self.columns.items()}
        return Rows(self.card, self.operator, columns, self.variant[mask], self.seconds[mask], self.sources)


def silicon_directory() -> Path | None:
    """Where the measured rows lie, or None."""
    beside = Path(__file__).resolve().parents[3] / "shared" / "silicon"
    path = Path(os.environ.get("SILICON_DIR") or beside)
    return path if path.is_dir() else None


def require_silicon(directory: str | Path | None = None) -> Path:
    """`directory`, or the default one. Raises :class:`UserError` when there is none."""
    path = Path(directory) if directory else silicon_directory()
    if path is None or not path.is_dir():
        raise UserError(f"measured rows not found at {path or '$SILICON_DIR'}: set SILICON_DIR or pass --silicon DIR")
    return path


def kernel_of(operator: str, variant: str) -> Kernel:
    """How the kernel behind `variant` cuts its work."""
    return KERNELS.get((operator, variant.split("/")[0]), Kernel())


def read_all(
    directory: Path, operators: tuple[str, ...] = tuple(SOURCES), cards: tuple[str, ...] = tuple(CARDS.values())
) -> Iterator[Rows]:
    """Rows of each operator on each card."""
    for card in cards:
        for operator in operators:
            yield read_rows(directory, card, operator)


def read_rows(directory: Path, card: str, operator: str) -> Rows:
    """Rows of `operator` measured on `card`, a hardware name."""
    prefix = next(name for name, known in CARDS.items() if known == card)
    tables, sources = [], []
    for name in SOURCES[operator]:
        path = directory / f"{prefix}_{name}.parquet"
        table = _read_parquet(path)
        tables.append(_ADAPTERS[operator](table))
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        sources.append({"file": path.name, "sha256": digest, "rows": len(table["latency_ms"])})
    names = [name for name in tables[0] if name not in ("variant", "seconds")]
    joined = {name: np.concatenate([table[name] for table in tables]) for name in (*names, "variant", "seconds")}
    variant, seconds = joined.pop("variant"), joined.pop("seconds")
    return Rows(card, operator, joined, variant, seconds, tuple(sources))


def _read_parquet(path: Path) -> dict[str, np.ndarray]:
    from pyarrow import parquet  # only commands that read measured rows need it

    if not path.exists():
        raise UserError(f"{path}: no such file; measured rows are named CARD_OPERATOR.parquet")
    table = parquet.read_table(path)
    return {name: table[name].to_numpy(zero_copy_only=False) for name in table.column_names}


def _numbers(table: dict[str, np.ndarray], *names: str) -> dict[str, np.ndarray]:
    return {name: table[name].astype(float) for name in names} | {"seconds": table["latency_ms"] / 1e3}


def gemm_regime(m: np.ndarray) -> np.ndarray:
    """Which kernel family a library picks for `m` rows: a GEMV, a memory-bound skinny product, or full tiles."""
    return np.where(m <= 1, "m1", np.where(m <= 64, "m64", "wide"))


def moe_regime(tokens: np.ndarray) -> np.ndarray:
    """Fused MoE kernels switch tile sizes as the tokens of an expert grow."""
    return np.where(tokens <= 64, "t64", "wide")


def _gemm(table):
    columns = _numbers(table, "m", "n", "k")
    return columns | {"variant": _joined(table["kernel_source"], gemm_regime(columns["m"]))}


def _moe(table):
    columns = _numbers(table, "num_tokens", "hidden_size", "topk", "num_experts")
    columns["width"] = table["inter_size"] / table["moe_tp_size"]
    columns["distribution"] = table["distribution"]
    keys = zip(table["num_tokens"], table["num_experts"], table["topk"], table["distribution"], strict=True)
    columns["distinct"] = np.array([distinct_experts(int(t), int(e), int(k), d) for t, e, k, d in keys])
    return columns | {"variant": _joined(table["kernel_source"], moe_regime(columns["num_tokens"]))}


def _decode_attention(table):
    columns = _numbers(table, "batch_size", "num_heads", "num_key_value_heads", "head_dim")
    context = (table["isl"] + table["step"]).astype(float)
    window = table.get("window_size", np.zeros_like(context)).astype(float)
    columns["window_size"] = window
    columns["context"] = np.where(window > 0, np.minimum(context, window), context)
    width = np.array([f"d{int(dim)}" for dim in columns["head_dim"]])
    return columns | {"variant": _joined(table["kernel_source"], width)}


def _decode_mla(table):
    columns = _numbers(table, "batch_size", "num_heads")
    columns["context"] = (table["isl"] + table["step"]).astype(float)
    return columns | {"variant": table["kernel_source"].astype(str)}


def _prefill_attention(table):
    columns = _numbers(table, "batch_size", "isl", "num_heads", "num_key_value_heads", "head_dim")
    return columns | {"variant": table["kernel_source"].astype(str)}


def _prefill_mla(table):
    return _numbers(table, "batch_size", "isl", "num_heads") | {"variant": table["kernel_source"].astype(str)}


def _collective(table):
    columns = _numbers(table, "num_gpus", "message_size")
    names = np.where(table["kernel_source"] == "NCCL", table["op_name"], "")
    return columns | {"variant": _joined(table["kernel_source"], names)}


def _joined(kernels, parts) -> np.ndarray:
    return np.array([f"{k}/{p}" if p else str(k) for k, p in zip(kernels, parts, strict=True)])


_ADAPTERS = {
    "gemm": _gemm,
    "moe": _moe,
    "decode_attention": _decode_attention,
    "decode_mla": _decode_mla,
    "prefill_attention": _prefill_attention,
    "prefill_mla": _prefill_mla,
    "collective": _collective,
}
assert set(_ADAPTERS) == set(SOURCES) <= set(FORMS)
