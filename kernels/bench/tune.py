"""Finds block sizes for this card: every candidate of an operator on every case, the fastest right one kept by key."""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections import Counter
from collections.abc import Sequence

import torch

from kernels import tuning
from kernels.bench.cases import Case
from kernels.bench.measure import seconds_per_call
from kernels.bench.problems import Tensors
from kernels.bench.run import SEED, TOLERANCE, expectations, worst_error
from kernels.launch import compiling_ahead
from kernels.moe_ffn.blocks import ALL_TILES, OF_DOWN, SMALL_ROWS


def _product(**choices: tuple[int, ...]) -> list[dict[str, int]]:
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


Configs = list[dict[str, int]]

FEW_ROWS = [
    {"BLOCK_N": n, "DOWN_N": down, "BLOCK_K": k, "num_stages": stages}
    for n, down in ((16, 16), (32, 16), (32, 32), (64, 32), (64, 64))
    for k, stages in ((128, 5), (256, 3), (256, 4))
]
GATE_UP_OF_SOME_ROWS = [
    {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "num_warps": 4, "num_stages": stages}
    for m, n in ((16, 64), (16, 128), (32, 64), (32, 128), (64, 64))
    for k, stages in ((128, 3), (64, 4))
]
GATE_UP_OF_MANY_ROWS = [
    {"BLOCK_M": 128, "BLOCK_N": n, "BLOCK_K": 64, "num_warps": warps, "num_stages": stages, "GROUP": group, "TMA": tma}
    for n, warps, stages, tma in (
        (128, 8, 3, 1),
        (128, 8, 4, 1),
        (128, 8, 3, 0),
        (128, 8, 4, 0),
        (64, 4, 3, 0),
    )
    for group in (8, 32, ALL_TILES)
]
# Its slices may be twice as wide: it has one accumulator where gate and up have two.
DOWN_OF_MANY_ROWS = [
    {"DOWN_N": n, "DOWN_K": 64, "down_warps": 8, "down_stages": stages, "DOWN_GROUP": group, "DOWN_TMA": tma}
    for n, stages, tma in ((128, 3, 1), (256, 4, 1), (128, 3, 0), (256, 4, 0))
    for group in (4, 8, 16, 32, ALL_TILES)
]


def _of_down(configs: Configs) -> Configs:
    """The same for down, without what both share."""
    renamed = [{OF_DOWN[name]: value for name, value in config.items() if name in OF_DOWN} for config in configs]
    return [config for index, config in enumerate(renamed) if config not in renamed[:index]]


PREFILL_GQA = [
    {"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": stages, "waves": waves}
    for m, n, warps, stages, waves in (
        (128, 64, 8, 2, 1), (128, 64, 8, 3, 1), (128, 64, 8, 4, 1), (128, 128, 8, 2, 1), (128, 128, 8, 3, 1),
        (64, 64, 4, 2, 2), (64, 64, 4, 3, 2), (64, 128, 4, 2, 1), (64, 32, 4, 4, 2),
    )
]  # fmt: skip
PREFILL_MLA = [{"BLOCK_N": n, "num_stages": stages} for n, stages in ((32, 2), (32, 3), (32, 4), (64, 2))]


def candidates(operator: str, rows: int) -> list[Configs]:
    """Configurations worth trying, in rounds of which each begins with the best of those before; none for an operator that
    has nothing to choose."""
    if operator == "decode_gqa":
        return [_product(BLOCK_N=(32, 64, 128), num_stages=(5, 7), waves=(2, 3, 4))]
    if operator == "decode_mla":
        return [_product(BLOCK_H=(16, 32), BLOCK_N=(32, 64), num_warps=(4, 8), num_stages=(3, 5), waves=(2,))]
    if operator == "prefill_gqa":
        return [PREFILL_GQA]
    if operator == "prefill_mla":
        return [PREFILL_MLA]
    if operator == "moe_ffn":
        if rows <= SMALL_ROWS:
            return [FEW_ROWS]
        if rows <= 256:
            return [GATE_UP_OF_SOME_ROWS, _of_down(GATE_UP_OF_SOME_ROWS)]
        return [GATE_UP_OF_MANY_ROWS, DOWN_OF_MANY_ROWS]
    return []


class _Trial:
    """A case that configurations are tried on."""

    def __init__(self, case: Case, device: torch.device, dtype: torch.dtype) -> None:
        self.operator = "moe_ffn" if case.op == "dense_ffn" else case.op
        self.shape, self.device, self.tolerance = f"{case.op} {case.shape}", device, TOLERANCE[dtype]
        self.chunk = case.chunk or case.shape
        torch.manual_seed(SEED)
        self.problem = case.build(device, dtype)
        tuning.take_last_key(self.operator)
        self.problem.variants[0]()
        self.key = tuning.take_last_key(self.operator)  # None: it has nothing to choose

    @functools.cached_property
    def expected(self) -> dict[int, Tensors]:
        return expectations(self.problem)

    def seconds(self) -> float:
        """Of a call as it is configured now; infinite where that is wrong or does not fit this card."""
        try:
            if worst_error(self.problem, self.expected) <= self.tolerance:
                return seconds_per_call(self.problem.variants, self.device)
        except Exception:  # noqa: BLE001  such a configuration is simply not chosen
            torch.cuda.empty_cache()
        return math.inf


def tune(cases: list[Case], device: torch.device, dtype: torch.dtype, limit_s: float) -> dict[str, dict[str, int]]:
    """The best configuration by "operator/key", of what could be tried in `limit_s` seconds, compiling apart, shared evenly among
    cases. Cases with the same key, which must follow each other, share one, by :func:`relative_time`."""
    found: dict[str, dict[str, int]] = {}
    left_s = limit_s
    done = 0
    with torch.inference_mode():
        trials = (_Trial(case, device, dtype) for case in cases)
        for (operator, key), group in itertools.groupby(trials, lambda trial: (trial.operator, trial.key)):
            alike = list(group)
            share_s = left_s * len(alike) / (len(cases) - done)
            done += len(alike)
            if key is not None:
                best, spent_s = _tune_alike(alike, share_s)
                left_s -= spent_s
                if best:
                    found[f"{operator}/{key}"] = best
    return found


def relative_time(times: Sequence[float], others: Sequence[float], chunks: Sequence[str]) -> float:
    """How long one configuration takes by another's time, from both their `times` of the same cases.

    Which prefix a chunk comes after, nobody knows when its configuration is chosen: a graph serves any. So a chunk's times after
    several prefixes are summed, and what is long after many tokens outweighs what is little after none. Different chunks (or
    other shapes, each a chunk of its own here) count alike: their ratios are multiplied.
    """
    mine, theirs = Counter(), Counter()
    for seconds, other, chunk in zip(times, others, chunks, strict=True):
        mine[chunk] += seconds
        theirs[chunk] += other
    return math.prod(mine[chunk] / theirs[chunk] for chunk in mine)


def _tune_alike(trials: list[_Trial], limit_s: float) -> tuple[dict[str, int], float]:
    """(the best configuration of cases that share one, empty where none is better than what they have; seconds that trying took)."""
    operator, key = trials[0].operator, trials[0].key
    chunks = [trial.chunk for trial in trials]
    rows = int(key.rsplit("_t", 1)[1]) if "_t" in key else 0
    best: dict[str, int] = {}
    began, compiling_s = time.monotonic(), 0.0
    former_times = best_times = least_times = [trial.seconds() for trial in trials]
    for configs in candidates(operator, rows):
        begin = best or tuning.known(operator, key, trials[0].device)
        tried = [{**begin, **config} for config in configs]
        compiling_s += _compile(trials, tried)
        for config in tried:
            if time.monotonic() - began - compiling_s > limit_s:
                print(f"{trials[0].shape}: out of time, the later configurations were not tried")
                break
            tuning.set_override(operator, config)
            times = [trial.seconds() for trial in trials]
            tuning.set_override(operator, None)
            print(f"tried {trials[0].shape}..: {config}: {' '.join(f'{t * 1e6:.1f}' for t in times)} us", flush=True)
            least_times = list(map(min, times, least_times))
            if relative_time(times, best_times, chunks) < 1:
                best, best_times = config, times
    for trial, former, now, least in zip(trials, former_times, best_times, least_times, strict=True):
        print(
            f"tuned {trial.shape}: {former * 1e6:.1f} -> {now * 1e6:.1f} us (least of any: {least * 1e6:.1f}) "
            f"{best or 'as before'}",
            flush=True,
        )
    return best, time.monotonic() - began - compiling_s


def _compile(trials: list[_Trial], configs: Configs) -> float:
    """Compile what the trials would launch with each of `configs`, in parallel; returns the seconds that took."""
    began = time.monotonic()
    with compiling_ahead():
        for config in configs:
            tuning.set_override(trials[0].operator, config)
            for trial in trials:
                trial.problem.variants[0]()
        tuning.set_override(trials[0].operator, None)
    return time.monotonic() - began
