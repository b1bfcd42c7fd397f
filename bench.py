"""`python bench.py`: one run, or with `-m` a sweep. Hydra composes the configuration; past this file there is none of it."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from pathlib import Path

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # an interrupt while the packages load simply ends the command
os.environ["HYDRA_FULL_ERROR"] = "1"  # raise, so that this file decides what a person reads

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from runner import sweep
from runner.overrides import explain
from runner.short import VARIABLE, is_short, shortened
from serving.errors import UserError, one_line

CONFIGURATION = Path(__file__).resolve().parent / "conf"


@hydra.main(config_path="conf", config_name="bench", version_base="1.3")
def task(config: DictConfig) -> None:
    overrides = list(HydraConfig.get().overrides.task)
    sweep.run_cell(OmegaConf.to_container(config, resolve=True), overrides)


def main() -> int:
    _interrupt_on(signal.SIGINT, signal.SIGTERM)
    if is_short():
        print(f"note: {VARIABLE} is set: the first cell, and a second of arrivals", file=sys.stderr)
        sys.argv[1:] = shortened(sys.argv[1:])
    sys.argv[1:] = sorted(sys.argv[1:], key=lambda word: word not in ("-m", "--multirun"))  # it may stand anywhere
    with tempfile.TemporaryDirectory(prefix="sweep-", dir=_folder_that_nodes_share()) as folder:
        log = Path(folder) / "cells.jsonl"
        told = f"+hydra.job.env_set.{sweep.LOG_VARIABLE}={log}"  # reaches cells wherever a launcher runs them
        sys.argv.insert(_first_override(sys.argv), told)  # beside the others, which argparse wants in one piece
        try:
            task()
        except (HydraException, OmegaConfBaseException, ValueError) as error:  # of composing: a cell keeps its own
            print(f"error: {explain(error, CONFIGURATION, sys.argv[1:])}", file=sys.stderr)
            return 2
        except BrokenPipeError:  # whoever read the output, `head` say, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        except UserError as error:  # of a launcher: no cell has run
            print(f"error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            sweep.report(log)
            print("interrupted; finished runs are kept and will not be run again", file=sys.stderr)
            return 130
        except Exception as error:  # noqa: BLE001 - a launcher lost a job: cells tell of their own failures
            sweep.report(log)
            print(f"error: the launcher lost a cell: {one_line(f'{type(error).__name__}: {error}')}", file=sys.stderr)
            return 2
        return sweep.report(log)


def _first_override(words: list[str]) -> int:
    """Where the first word of the form name=value stands; after the last where there is none."""
    return next((at for at, word in enumerate(words) if at and "=" in word and not word.startswith("-")), len(words))


def _folder_that_nodes_share() -> Path | None:
    """Where cells on other nodes of a cluster can say what became of them; None, a local one, where that is not writable."""
    folder = CONFIGURATION.parent / "results" / "local" / ".sweeps"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK) else None


def _interrupt_on(*signals: signal.Signals) -> None:
    """Let these end a run as Ctrl-C does, record kept, unless whoever started the command ignores them."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    for number in signals:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, interrupt)


if __name__ == "__main__":
    raise SystemExit(main())
