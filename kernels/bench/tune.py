"""Finds block sizes for this card: every candidate of an operator on every case, the fastest right one kept by key."""

from __future__ import annotations

import itertools
import time

import torch

from kernels import tuning
from kernels.bench.cases import Case
from kernels.bench.measure import seconds_per_call
from kernels.bench.run import SEED, TOLERANCE, worst_error
from kernels.launch import compile_ahead, recording


def _product(**choices: tuple[int, ...]) -> list[dict[str, int]]:
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


FEW_ROWS = [
    {"BLOCK_N": n, "DOWN_N": down, "BLOCK_K": k, "num_stages": stages}
    for n, down in ((16, 16), (32, 16), (32, 32), (64, 32), (64, 64))
    for k, stages in ((128, 5), (256, 3), (256, 4))
]
SOME_ROWS = _product(BLOCK_N=(32, 64, 128), DOWN_N=(64, 128), BLOCK_K=(128, 64), num_stages=(3, 4))
MANY_ROWS = [
    {"BLOCK_M": m, "BLOCK_N": n, "DOWN_N": down, "BLOCK_K": 64, "num_warps": warps, "num_stages": stages}
    for m, n, down, warps in ((128, 128, 128, 8), (128, 64, 128, 4), (64, 128, 128, 4), (128, 128, 256, 8))
    for stages in (3, 4)
]


def candidates(operator: str, rows: int) -> list[dict[str, int]]:
    """Configurations worth trying; none for an operator that has nothing to choose."""
    if operator == "decode_gqa":
        return _product(BLOCK_N=(32, 64, 128), num_stages=(5, 7), waves=(2, 3, 4))
    if operator == "decode_mla":
        return _product(BLOCK_H=(16, 32), BLOCK_N=(32, 64), num_warps=(4, 8), num_stages=(3, 5), waves=(2,))
    if operator == "prefill_gqa":
        return _product(BLOCK_M=(64, 128), BLOCK_N=(64, 128), num_warps=(4, 8), num_stages=(3, 5))
    if operator == "prefill_mla":
        return _product(BLOCK_M=(32, 64), BLOCK_N=(16, 32, 64), num_warps=(4, 8), num_stages=(2, 3))
    if operator == "moe_ffn":
        return FEW_ROWS if rows <= 16 else SOME_ROWS if rows <= 256 else MANY_ROWS
    return []


def tune(cases: list[Case], device: torch.device, dtype: torch.dtype, limit_s: float) -> dict[str, dict[str, int]]:
    """The best configuration by "operator/key", of what could be tried in `limit_s` seconds shared evenly among cases."""
    found: dict[str, dict[str, int]] = {}
    began = time.monotonic()
    for index, case in enumerate(cases):
        share = (limit_s - (time.monotonic() - began)) / (len(cases) - index)
        torch.manual_seed(SEED)
        with torch.inference_mode():
            best = _tune_case(case, device, dtype, share)
        if best is not None:
            found[best[0]] = best[1]
    return found


def _tune_case(
    case: Case, device: torch.device, dtype: torch.dtype, limit_s: float
) -> tuple[str, dict[str, int]] | None:
    deadline = time.monotonic() + limit_s
    operator = "moe_ffn" if case.op == "dense_ffn" else case.op
    problem = case.build(device, dtype)
    tuning.take_last_key(operator)
    problem.variants[0]()
    key = tuning.take_last_key(operator)
    if key is None:
        return None
    rows = int(key.rsplit("_t", 1)[1]) if "_t" in key else 0
    best_seconds, best = seconds_per_call(problem.variants, device), None
    default_seconds = best_seconds
    configs = candidates(operator, rows)
    with recording() as calls:
        for config in configs:
            tuning.set_override(operator, config)
            problem.variants[0]()
        tuning.set_override(operator, None)
    compile_ahead(calls)
    for config in configs:
        if time.monotonic() > deadline:
            print(f"{case.op} {case.shape}: out of time, the later configurations were not tried")
            break
        tuning.set_override(operator, config)
        try:
            if worst_error(problem) <= TOLERANCE[dtype]:
                seconds = seconds_per_call(problem.variants, device)
                if seconds < best_seconds:
                    best_seconds, best = seconds, config
        except Exception:  # noqa: BLE001  a configuration that does not fit this card is simply not chosen
            torch.cuda.empty_cache()
        finally:
            tuning.set_override(operator, None)
    print(
        f"tuned {case.op} {case.shape}: {default_seconds * 1e6:.1f} -> {best_seconds * 1e6:.1f} us {best or 'default'}"
    )
    return None if best is None else (f"{operator}/{key}", best)
