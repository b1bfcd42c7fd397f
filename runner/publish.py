"""`python -m runner.publish FOLDER`: an experiment's figures and tables to W&B, in the group of its runs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from runner.config import TRACKING_MODES, Tracking
from runner.tracking import publish
from serving.errors import UserError, command


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m runner.publish", description=__doc__)
    parser.add_argument("folder", type=Path, help="what paper_figures drew of one experiment; its name is the group's")
    parser.add_argument("--mode", choices=TRACKING_MODES, default="offline")
    parser.add_argument("--project", default="crosspool")
    parser.add_argument("--out", type=Path, help="where W&B keeps its run (default: FOLDER)")
    arguments = parser.parse_args(argv)
    exhibits = sorted(path for path in arguments.folder.glob("[!.]*.*") if path.is_file())
    if not exhibits:
        raise UserError(f"{arguments.folder}: holds no figures; draw some with: python -m paper_figures")
    tracking = Tracking(mode=arguments.mode, project=arguments.project)
    run = publish(exhibits, arguments.folder.resolve().name, tracking, arguments.out or arguments.folder)
    print(f"{len(exhibits)} files in {run}" if run else "tracking is disabled; nothing was logged")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
