"""`python -m workloads`: describe a workload or a trace file, generate a trace file, bench the package."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from workloads.errors import WorkloadError

if TYPE_CHECKING:
    from workloads.columnar import Trace

_EPILOG = """examples:
  python -m workloads describe skew0.9 workload.duration_s=600
  python -m workloads describe cold --models 64 --plot cold.png
  python -m workloads generate skew0.9 --out skew0.9.jsonl workload.seeds.schedule=1
  python -m workloads describe skew0.9.jsonl
  python -m workloads describe azure_llm_2023_conv.csv --format azure
  python -m workloads bench"""


def main(arguments: list[str] | None = None) -> int:
    options = _parsed(arguments)
    try:
        options.run(options)
        sys.stdout.flush()
    except WorkloadError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output, `head` for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _parsed(arguments: list[str] | None) -> argparse.Namespace:
    """Options and overrides in any order, which argparse's sub-commands alone do not take."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    wrong = [argument for argument in rest if argument.startswith("-") or "=" not in argument]
    if wrong or (rest and not hasattr(options, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(wrong or rest)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m workloads", description=__doc__, epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    commands = parser.add_subparsers(required=True)
    describe = commands.add_parser("describe", help="print and draw what a workload or a trace file holds")
    describe.add_argument("what", help="a preset, a YAML file, a trace file, or a real trace with --format")
    describe.add_argument("--format", help="read WHAT as a real trace: azure, mooncake, burstgpt, lengths")
    describe.add_argument(
        "--window-s", type=float, help="for rates and active models over time; a twentieth by default"
    )
    describe.add_argument("--plot", type=Path, help="the figure; default results/local/workloads/WHAT.png")
    describe.set_defaults(run=_describe)
    generate = commands.add_parser("generate", help="write a trace file")
    generate.add_argument("what", help="a preset or a YAML file")
    generate.add_argument("--out", type=Path, required=True, help="a .jsonl or .parquet file")
    generate.set_defaults(run=_generate)
    for command in (describe, generate):
        command.add_argument("overrides", nargs="*", help="key=value, as for bench.py")
        command.add_argument("--models", type=int, help="so many made-up models instead of the preset's")
        command.add_argument("--vocab-size", type=int, default=32_000, help="of models without a checkpoint")
        command.add_argument("--context-tokens", type=int, default=1 << 18, help="of models without a checkpoint")
    bench = commands.add_parser("bench", help="time and memory: generate, stream, write, read")
    bench.add_argument("--models", type=int, default=1000)
    bench.add_argument("--requests", type=int, default=1_000_000)
    bench.add_argument("--source-mb", type=int, default=100, help="size of the real trace that is read")
    bench.add_argument("--out", type=Path, help="write the figures as JSON")
    bench.set_defaults(run=_bench)
    return parser


def _describe(options: argparse.Namespace) -> None:
    from workloads.report import source_report, trace_report

    path = Path(options.what)
    if options.format:
        from workloads.config import Source, workload_from_dict
        from workloads.known import known_by_checksum
        from workloads.sources import load_source

        source = workload_from_dict({"source": {"format": options.format, "path": options.what}}).source
        rows = load_source(Source(source.format, source.path))
        print(source_report(rows, known_by_checksum(rows.identity.get("sha256", ""))))
        return
    if path.suffix in (".jsonl", ".parquet"):
        from workloads.files import read_trace

        trace = read_trace(path)
    else:
        trace = _built(options)
    window_s = options.window_s if options.window_s is not None else trace.duration_s / 20
    if not 0 < window_s <= trace.duration_s:
        raise WorkloadError(
            f"--window-s is {window_s:g}; it must lie between 0 and the duration, {trace.duration_s:g} s"
        )
    print(trace_report(trace, window_s))
    from workloads.draw import draw

    figure = options.plot or Path("results/local/workloads") / f"{path.name.removesuffix('.yaml')}.png"
    draw(trace, window_s, figure)
    print(f"figure: {figure}")


def _generate(options: argparse.Namespace) -> None:
    from workloads.files import write_trace

    trace = _built(options)
    digest = write_trace(trace, options.out)
    print(json.dumps({"file": str(options.out), "requests": len(trace), "digest": digest}))


def _built(options: argparse.Namespace) -> Trace:
    from workloads.columnar import ModelLimits
    from workloads.compose import compose
    from workloads.generate import build_trace

    for name in ("models", "vocab_size", "context_tokens"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise WorkloadError(f"--{name.replace('_', '-')} is {value}; it must be 1 or more")
    limits = ModelLimits("", options.vocab_size, options.context_tokens)
    config, models, assumed = compose(options.what, options.overrides, options.models, limits)
    if assumed and not config.trace_file:
        print(
            f"note: no checkpoint of {', '.join(assumed[:4])}{' and others' if len(assumed) > 4 else ''}: a vocabulary of "
            f"{limits.vocab_size} and contexts of {limits.max_context_tokens} tokens are assumed",
            file=sys.stderr,
        )
    return build_trace(config, models)


def _bench(options: argparse.Namespace) -> None:
    from workloads.bench import bench

    found = bench(options.models, options.requests, options.source_mb)
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
