"""Seconds of one operator on one card: the fitted form of the kernel that is taken to run there, table-corrected if it can be.

Scalars in, seconds out, remembered: a simulator asks the same question many times. Contexts are rounded to 1 % before they
are looked up, so that a growing context does not defeat the memory.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path

from serving.cost.fitted_set import FittedSet, shipped
from serving.cost.form import Kernel
from serving.cost.forms import ELEMENTWISE, FORMS
from serving.cost.hardware import Hardware
from serving.cost.routing import distinct_experts
from serving.cost.silicon import CARDS, gemm_regime, kernel_of, moe_regime, read_all
from serving.cost.table import MeasuredTable
from serving.errors import UserError
from serving.spec import element_bytes

# The measured kernel that stands for ours on a card, by the card whose rows were fitted. A100: SGLang's kernels, as the paper
# runs them, where rows exist; for MLA the Triton kernel (its measured host floor falls away inside a captured graph).
KERNEL_CHOICE = {
    "a100-80gb": {
        "gemm": "vllm_default",
        "moe": "sglang_fused_moe_triton",
        "decode_attention": "flash_attention",
        "decode_mla": "vllm_triton_mla",
        "prefill_attention": "vllm_flash_attn",
        "prefill_mla": "vllm_triton_mla",
        "collective": "vLLM_custom_graph",
    },
    "h200": {
        "gemm": "vllm_default",
        "moe": "sglang_fused_moe_triton",
        "decode_attention": "fa3",
        "decode_mla": "flash_attention",
        "prefill_attention": "vllm_flash_attn",
        "prefill_mla": "flash_attention",
        "collective": "vLLM_custom_graph",
    },
}
OWN_KERNELS = "own"  # a calibration of this machine runs this project's kernels
# [assumption] elementwise kernels on cards without rows of them: the smallest measured GEMM's fixed cost, 80 % of the bandwidth.
ASSUMED = {name: {"t0_us": 2.4, "eta_b": 0.8} for name in ELEMENTWISE}
PASSES = {
    "embed": 2.0,
    "norm": 4.0,
    "rope": 2.0,
    "route": 1.0,
    "activation": 3.0,
    "sample": 1.0,
}  # norm: with residual add


class CostModel:
    """Operator costs of one card in one dtype.

    `fitted` defaults to what is shipped for the card (`hardware.fitted_on`); `tables` (operator -> table) correct it where
    given. `kernels` overrides :data:`KERNEL_CHOICE` by operator. `graph` says that launches are captured, so that a host
    that cannot keep up does not count; `cold` that no KV is found in the last-level cache.
    """

    def __init__(
        self,
        hardware: Hardware,
        dtype: str = "bfloat16",
        fitted: FittedSet | None = None,
        tables: Mapping[str, MeasuredTable] | None = None,
        kernels: Mapping[str, str] | None = None,
        graph: bool = True,
        cold: bool = True,
    ):
        self.hardware, self.dtype, self.graph, self.cold = hardware, dtype, graph, cold
        self.element_bytes = element_bytes(dtype)
        self.fitted = fitted or shipped(hardware.fitted_on)
        self.tables = dict(tables or {})
        self.kernels = {**KERNEL_CHOICE.get(self.fitted.card, {}), **(kernels or {})}
        self._seconds = functools.lru_cache(maxsize=None)(self._operator_s)

    # -- operators -----------------------------------------------------------------------------------------------------
    def gemm_s(self, rows: int, outputs: int, inputs: int) -> float:
        """[rows, inputs] x [inputs, outputs]."""
        return self._seconds("gemm", str(gemm_regime(rows)), (("m", rows), ("n", outputs), ("k", inputs)))

    def moe_s(
        self, tokens: int, hidden: int, width: float, top_k: int, num_experts: int, distribution: str = "uniform"
    ) -> float:
        """The routed experts of one layer, each `width` wide on this device."""
        hit = distinct_experts(tokens, num_experts, top_k, distribution)
        columns = (
            ("num_tokens", tokens),
            ("hidden_size", hidden),
            ("width", width),
            ("topk", top_k),
            ("num_experts", num_experts),
            ("distinct", hit),
        )
        return self._seconds("moe", str(moe_regime(tokens)), columns)

    def decode_attention_s(self, batch: int, context: float, heads: int, kv_heads: int, head_dim: int) -> float:
        """The attention core of one layer for `batch` sequences of `context` tokens on average."""
        columns = (
            ("num_heads", heads),
            ("num_key_value_heads", kv_heads),
            ("head_dim", head_dim),
            ("window_size", 0),
            ("batch_size", batch),
            ("context", rounded(context)),
        )
        return self._seconds("decode_attention", f"d{head_dim}", columns)

    def decode_mla_s(self, batch: int, context: float, heads: int, kv_rank: int = 512, rope_dim: int = 64) -> float:
        """The absorbed MLA core of one layer."""
        columns = (
            ("num_heads", heads),
            ("kv_rank", kv_rank),
            ("rope_dim", rope_dim),
            ("batch_size", batch),
            ("context", rounded(context)),
        )
        return self._seconds("decode_mla", "", columns)

    def prefill_attention_s(self, batch: int, tokens: int, heads: int, kv_heads: int, head_dim: int) -> float:
        """The causal core of one layer for `batch` fresh prompts of `tokens` tokens."""
        columns = (
            ("num_heads", heads),
            ("num_key_value_heads", kv_heads),
            ("head_dim", head_dim),
            ("batch_size", batch),
            ("isl", rounded(tokens)),
        )
        return self._seconds("prefill_attention", "", columns)

    def prefill_mla_s(
        self, batch: int, tokens: int, heads: int, qk_dim: int = 192, v_dim: int = 128, kv_rank: int = 512
    ) -> float:
        """The expanded MLA core of one layer for fresh prompts."""
        columns = (
            ("num_heads", heads),
            ("qk_dim", qk_dim),
            ("v_dim", v_dim),
            ("kv_rank", kv_rank),
            ("batch_size", batch),
            ("isl", rounded(tokens)),
        )
        return self._seconds("prefill_mla", "", columns)

    def all_reduce_s(self, message_bytes: int, gpus: int) -> float:
        """All-reduce of one tensor over `gpus` cards of one node; nothing for one card."""
        if gpus == 1:
            return 0.0
        return self._seconds("collective", "", (("num_gpus", gpus), ("message_size", max(1, message_bytes))))

    def elementwise_s(self, name: str, rows: int, width: int) -> float:
        """One of :data:`~serving.cost.forms.ELEMENTWISE` over `rows` rows of `width` elements."""
        return self._seconds(name, "", (("width", width), ("rows", rows), ("passes", PASSES[name])))

    # -- how -----------------------------------------------------------------------------------------------------------
    def variant(self, operator: str, regime: str) -> str:
        """The fitted variant that answers for `operator` in `regime` (a size class or a head width).

        A head width that was never measured borrows the nearest one. Raises :class:`UserError` naming what is missing.
        """
        kernel = self.kernels.get(operator, OWN_KERNELS)
        mine = [v for name, v in self.fitted.variants if name == operator and v.split("/")[0] == kernel]
        wanted = f"{kernel}/{regime}" if regime else kernel
        if wanted in mine:
            return wanted
        if kernel in mine:
            return kernel
        if mine and regime.startswith("d"):
            return min(mine, key=lambda name: abs(int(name.split("/d")[1]) - int(regime[1:])))
        known = sorted({v for name, v in self.fitted.variants if name == operator})
        raise UserError(f"{self.fitted.card}: no fitted {operator} {wanted!r}; known: {', '.join(known) or 'none'}")

    def _operator_s(self, operator: str, regime: str, columns: tuple[tuple[str, float], ...]) -> float:
        values: dict[str, float | bool] = dict(columns)
        values |= {"graph": self.graph, "cold": self.cold}
        form = FORMS[operator]
        if operator in ASSUMED and not self.fitted.coefficients(operator):
            return float(form.cost(ASSUMED[operator], values, self.hardware, self._kernel(operator, "")))
        variant = self.variant(operator, regime)
        coefficients = self.fitted.variants[operator, variant].coefficients
        seconds = float(form.cost(coefficients, values, self.hardware, self._kernel(operator, variant)))
        table = self.tables.get(operator)
        return seconds * table.correction(variant, values) if table else seconds

    def _kernel(self, operator: str, variant: str) -> Kernel:
        return dataclasses.replace(kernel_of(operator, variant), cast_bytes=self.element_bytes)


def measured_tables(hardware: Hardware, directory: Path) -> dict[str, MeasuredTable]:
    """Tables over the shipped coefficients from all measured rows of `hardware` in `directory`, for :class:`CostModel`.

    Raises :class:`UserError` for a card without rows of its own: a table does not move to another card.
    """
    if hardware.name not in CARDS.values():
        raise UserError(f"{hardware.name}: no measured rows; cards that have them: {', '.join(CARDS.values())}")
    fitted = shipped(hardware.fitted_on)
    rows = read_all(directory, cards=(hardware.name,))
    return {mine.operator: MeasuredTable(mine, hardware, fitted.coefficients(mine.operator)) for mine in rows}


def rounded(tokens: float) -> int:
    """`tokens` to seven binary digits: exact up to 128, within 0.8 % beyond."""
    whole = max(1, round(tokens))
    step = 1 << max(0, whole.bit_length() - 7)
    return (whole + step // 2) // step * step
