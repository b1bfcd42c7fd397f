"""Checks, then times: a case is timed only if its operator's checks and the case's own result are right."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable

import torch

from kernels.bench.cases import Case
from kernels.bench.measure import alternated
from kernels.bench.problems import Problem, Tensors
from kernels.bench.report import Row
from kernels.launch import compiling_ahead

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1.5e-2}  # of ||actual - reference|| / ||reference||
SEED = 20


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Infinite where shapes, integers or finiteness differ."""
    if actual.shape != expected.shape:
        return float("inf")
    if not expected.is_floating_point():
        return 0.0 if actual.equal(expected) else float("inf")
    gap = float((actual.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-30))
    return gap if math.isfinite(gap) else float("inf")


def expectations(problem: Problem) -> dict[int, Tensors]:
    """What the first and the last variant must give."""
    return {index: problem.expected(index) for index in {0, len(problem.variants) - 1}}


def worst_error(problem: Problem, expected: dict[int, Tensors]) -> float:
    """Of the variants that `expected` knows."""
    errors = [0.0]
    for index, right in expected.items():
        pairs = zip(problem.variants[index](), right, strict=True)
        errors += [relative_error(actual, wanted) for actual, wanted in pairs]
    return max(errors)


def compile_cases(cases: Iterable[tuple[Case, torch.dtype]], device: torch.device) -> None:
    """Compile what the cases will launch, in parallel; CUDA only. What cannot even be built is found by its check."""
    with torch.inference_mode(), compiling_ahead():
        for case, dtype in cases:
            with contextlib.suppress(Exception):
                case.build(device, dtype).variants[0]()


def check(case: Case, device: torch.device, dtype: torch.dtype) -> Row:
    """The case's error, without a time; a `note` that begins with FAILED where it is wrong or raises."""
    name = str(dtype).removeprefix("torch.")
    torch.manual_seed(SEED)
    try:
        with torch.inference_mode():
            problem = case.build(device, dtype)
            error = worst_error(problem, expectations(problem))
    except Exception as failure:  # noqa: BLE001  a compiler's failure is a finding about this case; the others go on
        return Row(case.op, case.shape, name, None, note=f"FAILED: {type(failure).__name__}: {_short(failure)}")
    wrong = error > TOLERANCE[dtype]
    note = f"FAILED: relative error {error:.1e} over {TOLERANCE[dtype]:.0e}" if wrong else "ok"
    return Row(case.op, case.shape, name, None, error=error, note=note)


def time_case(case: Case, device: torch.device, dtype: torch.dtype, compile_peers: bool) -> Row:
    """A checked and timed row; untimed, with the reason, where the result is wrong."""
    row = check(case, device, dtype)
    if row.note != "ok":
        return row
    torch.manual_seed(SEED)
    with torch.inference_mode():
        problem = case.build(device, dtype)
        candidates = dict(problem.peers)
        if compile_peers:
            candidates |= {f"compiled {name}": _compiled(calls) for name, calls in problem.peers.items()}
        peers, notes = {}, []
        for name, calls in candidates.items():
            problem_with = _trial(calls)
            if problem_with:
                notes.append(f"({name}: {problem_with})")
            else:
                peers[name] = calls
        seconds, *peer_seconds = alternated([problem.variants, *peers.values()], device)
        peers = dict(zip(peers, peer_seconds, strict=True))
    return Row(
        case.op, case.shape, row.dtype, seconds, problem.bytes, problem.flops, row.error, peers, case.target,
        " ".join(notes),
    )  # fmt: skip


def _compiled(calls: list[Callable[[], object]]) -> list[Callable[[], object]]:
    return [torch.compile(call) for call in calls]


def _trial(calls: list[Callable[[], object]]) -> str:
    """Why this torch, card or size does not support a peer, which is no failure of ours: noted, and left out."""
    try:
        for call in calls:
            call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except Exception as failure:  # noqa: BLE001  as above
        with contextlib.suppress(RuntimeError):
            torch.cuda.synchronize()
        return _short(failure)
    return ""


def _short(failure: BaseException) -> str:
    return " ".join(str(failure).split())[:160]
