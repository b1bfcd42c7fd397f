"""Checks every kernel against its reference, then prints what it reaches of this machine's measured ceilings.

    python -m kernels.bench                      every operator, on the GPU where there is one
    python -m kernels.bench moe_ffn decode_gqa   these
    python -m kernels.bench --all --out DIR      all checks in float32 and bfloat16, the table, JSON and a roofline
    python -m kernels.bench --tune               find block sizes for this card first (kernels/tuned/)

Exits with 1, and times nothing of an operator, if one of its results is wrong.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")  # read at CUDA's start: nothing may load beside a resident kernel

import torch

from kernels import tuning
from kernels.bench.cases import CHECKS, CPU_CASES, CUDA_CASES, OPS, Target
from kernels.bench.measure import measure_ceilings
from kernels.bench.report import Row, save, table
from kernels.bench.run import TOLERANCE, check, compile_cases, time_case
from kernels.bench.tune import tune

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CUDA_ONLY_OPS = ("mailbox", "resident_ffn")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    known = (*OPS, *CUDA_ONLY_OPS)
    parser = argparse.ArgumentParser(
        prog="python -m kernels.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ops", nargs="*", help=f"any of: {', '.join(known)} (default: all)")
    parser.add_argument(
        "--shapes", nargs="+", metavar="PART", help="tune and time only cases whose shape has one of these in it"
    )
    parser.add_argument("--all", action="store_true", help="check in both dtypes, whatever is timed")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="default: bfloat16 on CUDA, float32 on the CPU")
    parser.add_argument(
        "--threads", type=int, default=1, help="of the CPU forms and their peers (default 1: one device)"
    )
    parser.add_argument("--out", type=Path, help="write kernels.json and roofline.png into this folder")
    parser.add_argument(
        "--compile", action="store_true", help="time torch.compile of the peers as well (slow to start)"
    )
    parser.add_argument(
        "--time-limit", type=float, default=330.0, help="seconds after which no further case is begun (default 330)"
    )
    parser.add_argument("--tune", action="store_true", help="find block sizes first and keep them for this card")
    parser.add_argument(
        "--tune-seconds",
        type=float,
        default=240.0,
        help="time that trying them may take, compiling apart (default 240)",
    )
    options = parser.parse_args(arguments)
    unknown = [op for op in options.ops if op not in known]
    if unknown:
        parser.error(f"unknown operator {unknown[0]!r}; known: {', '.join(known)}")
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this machine has no CUDA device that torch can use")
    if options.tune and options.device == "cpu":
        parser.error("--tune: only the CUDA kernels have block sizes to choose")
    if options.threads < 1:
        parser.error("--threads: at least 1 is needed")
    options.ops = tuple(options.ops) or known
    return options


def run_checks(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> set[str]:
    """Print every check; returns the operators that failed one."""
    red = set()
    for case in (case for case in CHECKS if case.op in options.ops):
        for kind in DTYPES.values() if options.all else (dtype,):
            row = check(case, device, kind)
            error = "" if row.error is None else f"{row.error:.1e}"
            print(f"check {row.op:12} {row.shape:34} {row.dtype:9} {error:>8} {row.note}", flush=True)
            if row.note != "ok":
                red.add(case.op)
    return red


def run_crossings(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> list[Row]:
    """The mailbox's and the resident executor's rows; CUDA only."""
    from kernels.bench.crossing import crossing_seconds, resident_seconds

    runs: list[tuple[str, str, int, Target | None, Callable[[], tuple[float, float]]]] = []
    if "mailbox" in options.ops:
        for rows in (1, 16):
            measure = functools.partial(crossing_seconds, rows, 2048, device, dtype)
            runs.append(
                ("mailbox", "one way", rows, Target(microseconds=4.0), lambda measure=measure: (measure(), 0.0))
            )
    if "resident_ffn" in options.ops:
        for rows in (1, 4, 16):
            target = Target(microseconds=40.0) if rows == 1 else None
            measure = functools.partial(resident_seconds, rows, device, dtype)
            runs.append(("resident_ffn", "Qwen3 with router", rows, target, measure))
    return [_crossing_row(*run, dtype) for run in runs]


def _crossing_row(
    op: str,
    what: str,
    num_rows: int,
    target: Target | None,
    measure: Callable[[], tuple[float, float]],
    dtype: torch.dtype,
) -> Row:
    name, shape = str(dtype).removeprefix("torch."), f"{what}, T={num_rows}"
    try:
        with torch.inference_mode():
            seconds, error = measure()
    except Exception as failure:  # noqa: BLE001  whatever it is, it is this row's finding
        return Row(op, shape, name, None, note=f"FAILED: {type(failure).__name__}: {failure}"[:200])
    if not error <= TOLERANCE[dtype]:
        return Row(op, shape, name, None, error=error, note=f"FAILED: relative error {error:.1e}")
    row_bytes = 4096 * num_rows  # of hidden 2048 in bfloat16: what crosses
    return Row(op, shape, name, seconds, row_bytes, 0.0, error, {}, target)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    began = time.monotonic()
    device = torch.device(options.device, 0) if options.device == "cuda" else torch.device("cpu")
    dtype = DTYPES[options.dtype or ("bfloat16" if options.device == "cuda" else "float32")]
    if options.device == "cpu":
        torch.set_num_threads(options.threads)
    cases = [case for case in (CUDA_CASES if options.device == "cuda" else CPU_CASES) if case.op in options.ops]
    if options.shapes:
        cases = [case for case in cases if any(part in case.shape for part in options.shapes)]
    if options.device == "cuda":
        kinds = DTYPES.values() if options.all else (dtype,)
        checks = [(case, kind) for case in CHECKS if case.op in options.ops for kind in kinds]
        compile_cases([*checks, *((case, dtype) for case in cases)], device)
        print(f"compiled in {time.monotonic() - began:.0f} s", flush=True)
    red = run_checks(options, device, dtype)
    for op in sorted(red):
        print(f"{op}: not timed, a check failed", file=sys.stderr)
    cases = [case for case in cases if case.op not in red]
    if options.tune:
        print(f"saved {tuning.save(device, tune(cases, device, dtype, options.tune_seconds))}")
    ceilings = measure_ceilings(device, dtype)
    rows = []
    for case in cases:
        if time.monotonic() - began > options.time_limit:
            name = str(dtype).removeprefix("torch.")
            rows.append(Row(case.op, case.shape, name, None, note="not timed: over --time-limit"))
        else:
            rows.append(time_case(case, device, dtype, options.compile))
    if options.device == "cuda":  # last: a failure here could take the device's context with it
        rows += run_crossings(options, device, dtype)
    print(
        f"\nmeasured ceilings: {ceilings.bytes_per_s / 1e9:.0f} GB/s, {ceilings.flops / 1e12:.2f} TFLOP/s "
        f"{str(dtype).removeprefix('torch.')}; {torch.get_num_threads()} host threads"
    )
    print(table(rows, ceilings))
    if options.out:
        print(f"wrote {save(rows, ceilings, device, options.out)}")
    print(f"{time.monotonic() - began:.0f} s")
    return 1 if red or any(row.note.startswith("FAILED") for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
