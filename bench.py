"""`python bench.py`: one run, or with `-m` a sweep. Hydra composes the configuration; past this file there is none of it."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

os.environ["HYDRA_FULL_ERROR"] = "1"  # raise, so that this file decides what a person reads

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from runner import sweep
from runner.config import bench_from_dict
from serving.errors import UserError, one_line
from workloads.errors import WorkloadError

_BAD_INPUT = (UserError, WorkloadError, HydraException, OmegaConfBaseException)


@hydra.main(config_path="conf", config_name="bench", version_base="1.3")
def task(config: DictConfig) -> None:
    sweep.run_cell(bench_from_dict, OmegaConf.to_container(config, resolve=True))


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="crosspool-sweep-") as folder:
        log = Path(folder) / "cells.jsonl"
        os.environ[sweep.LOG_VARIABLE] = str(log)
        try:
            task()
        except _BAD_INPUT as error:
            print(f"error: {one_line(_first_sentence(error))}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted; finished runs are kept and will not be run again", file=sys.stderr)
            return 130
        return sweep.report(log)


def _first_sentence(error: Exception) -> str:
    """Hydra spreads its messages over lines of search paths; what is wrong and what is known stand in the first ones."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    keep = [line for line in lines if not line.startswith(("provider=", "Config search path", "Set the env"))]
    return "; ".join(keep[:1]) + (" " + ", ".join(keep[1:13]) if len(keep) > 1 else "")


if __name__ == "__main__":
    raise SystemExit(main())
