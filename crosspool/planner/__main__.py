"""`python -m crosspool.planner CONFIG`: print and draw the plan; `--bench`: how fast and how sure the planner is.

Exit status 2, with what is missing, when the plan does not fit; the plan is printed and drawn all the same.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from crosspool.planner.bench import run_bench
from crosspool.planner.config import load_config
from crosspool.planner.figures import draw
from crosspool.planner.plan import make_plan
from crosspool.planner.report import report, watch_report
from crosspool.planner.traces import read_samples
from serving.errors import UserError, command


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m crosspool.planner", description=__doc__.split("\n\n")[0])
    parser.add_argument("config", nargs="?", help="a YAML file; examples lie in conf/planner")
    parser.add_argument("--out", type=Path, help="directory of figures and their CSV (outputs/planner/NAME)")
    parser.add_argument("--seed", type=int, help="instead of the configuration's")
    parser.add_argument("--observed", type=Path, help="CSV of a running pool: time_s, pages[, waiting_pages]; re-plan?")
    parser.add_argument("--block-s", type=float, default=60.0, help="observed time is judged in blocks of this (60)")
    parser.add_argument(
        "--bench", action="store_true", help="1,000 models, 1,000,000 requests: time, memory, precision"
    )
    args = parser.parse_args(argv)
    if args.seed is not None and args.seed < 0:
        raise UserError(f"seed {args.seed} is negative; a seed is a whole number of at least 0")
    if args.bench:
        result = run_bench(args.seed or 0)
        print(result)
        return 0 if result.passed else 1
    if args.config is None:
        raise UserError("no configuration given; try conf/planner/paper.yaml")
    config = load_config(args.config)
    plan = make_plan(config if args.seed is None else replace(config, seed=args.seed))
    print(report(plan))
    if args.observed:
        print("\n" + watch_report(plan, read_samples(args.observed), args.block_s))
    directory = args.out or Path("outputs") / "planner" / config.name
    files = draw(plan, directory)
    print(f"\nDrawn into {directory}: {', '.join(path.name for path in files)}")
    plan.layout.require_fit()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
