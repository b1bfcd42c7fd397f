"""`python -m runner.validation_rounds`: the validation, measured in rounds and simulated, then compared (runner/validation.py).

    python -m runner.validation_rounds --rounds 3

A round is every system at every rate, in pieces of two runs. The machine is calibrated before the first piece and after each, so
that what follows one piece precedes the next, and each run is simulated with the mean of the two calibrations around its piece,
a minute or two away: the machine's speed drifts. Nobody else may use the machine meanwhile.

The same command goes on where it was stopped. A piece counts when both of its runs and both of its calibrations are of one go;
what was stopped in the middle is begun again, with a calibration of its own before it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from runner.children import run_child
from runner.presets import composed
from runner.records import read_records
from runner.run import served_models
from runner.validation import compare, table
from serving.errors import UserError, command

_REPOSITORY = Path(__file__).resolve().parents[1]
SCENARIO = "validation"
CALIBRATE = ("-m", "serving.cost", "calibrate", "--rounds", "1", "--point-ms", "20", "--script-rounds", "3")
Run = Callable[[Sequence[str]], int]  # `python ARGUMENTS`, and its exit status


@dataclass(frozen=True)
class Cell:
    system: str
    rate_rps: float

    def __str__(self) -> str:
        return f"{self.system} at {self.rate_rps:g} req/s"

    def arguments(self, repeat: int, results: Path) -> list[str]:
        return [
            "bench.py",
            f"conf={SCENARIO}",
            f"system={self.system}",
            f"workload.rate={self.rate_rps:g}",
            f"repeat={repeat}",
            f"results_dir={results}",
        ]


PIECES = (
    (Cell("elastic", 1.0), Cell("quota", 1.0)),
    (Cell("swap", 1.0), Cell("crosspool", 1.0)),
    (Cell("static", 1.0), Cell("elastic", 0.5)),
    (Cell("quota", 0.5), Cell("swap", 0.5)),
    (Cell("crosspool", 0.5), Cell("static", 0.5)),
)


class Rounds:
    """`count` rounds of `pieces`, of which records and calibrations go below `results`, a path that counts from the repository.
    `run` carries out each command, `say` tells of progress."""

    def __init__(
        self,
        count: int,
        results: Path,
        models: Sequence[str],
        run: Run,
        say: Callable[[str], None] = print,
        pieces: Sequence[Sequence[Cell]] = PIECES,
    ) -> None:
        """`models` as `python -m serving.cost calibrate --model` takes them."""
        self._count, self._results, self._pieces = count, results, pieces
        self._calibrate = [*CALIBRATE, *(word for model in models for word in ("--model", model)), "--out"]
        self._run, self._say = run, say

    def measure(self) -> None:
        """Whatever is missing of every round. Raises UserError where a command fails."""
        for repeat in range(1, self._count + 1):
            began_s, before = time.monotonic(), None
            for number, cells in enumerate(self._pieces, start=1):
                if self._there(self._joined(repeat, number)):
                    before = None
                    continue
                name = f"round {repeat} of {self._count}, piece {number} of {len(self._pieces)}"
                if before is None:
                    before = self._file(repeat, f"piece-{number}-before")
                    self._do(f"{name}: calibration before", [*self._calibrate, str(before)])
                for cell in cells:
                    self._do(f"{name}: {cell}", [*cell.arguments(repeat, self._results), "force=true"])
                after = self._file(repeat, f"piece-{number}-after")
                self._do(f"{name}: calibration after", [*self._calibrate, str(after)])
                joined = str(self._joined(repeat, number))
                join = ["-m", "serving.cost", "join", "--out", joined, str(before), str(after)]
                self._do(f"{name}: both calibrations joined", join)
                before = after
            self._say(f"round {repeat} of {self._count} is measured, in {(time.monotonic() - began_s) / 60:.1f} min")

    def simulate(self, anew: bool = False) -> None:
        """Every run of a piece that was measured, with its calibration; what is simulated already only where `anew`."""
        for repeat in range(1, self._count + 1):
            for number, cells in enumerate(self._pieces, start=1):
                if not self._there(self._joined(repeat, number)):
                    continue
                told = ["backend=sim", "backend.card=", f"backend.calibration={self._joined(repeat, number)}"]
                told += ["force=true"] if anew else []
                for cell in cells:
                    name = f"round {repeat} of {self._count}: {cell}, simulated"
                    self._do(name, [*cell.arguments(repeat, self._results), *told])

    def _file(self, repeat: int, name: str) -> Path:
        return self._results / "calibrations" / f"round-{repeat}" / f"{name}.json"

    def _joined(self, repeat: int, number: int) -> Path:
        """What is written last of a piece."""
        return self._file(repeat, f"piece-{number}")

    @staticmethod
    def _there(path: Path) -> bool:
        return (_REPOSITORY / path).is_file()

    def _do(self, name: str, arguments: Sequence[str]) -> None:
        began_s = time.monotonic()
        self._say(f"-- {name}")
        if status := self._run(arguments):
            raise UserError(f"{name}: ended with status {status}; the same command goes on from there")
        self._say(f"   {time.monotonic() - began_s:.0f} s")


def models_to_calibrate() -> list[str]:
    """The scenario's models as NAME=DIRECTORY, checkpoints made where there are none."""
    models = served_models(composed(f"conf={SCENARIO}"))
    return [f"{model.name}={model.checkpoint}" for model in models]


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m runner.validation_rounds", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="how many, about a quarter of an hour each (default: 3)")
    parser.add_argument(
        "--results",
        type=Path,
        default=Path("results/local"),
        help="relative to the repository (default: results/local)",
    )
    parser.add_argument(
        "--simulate-only", action="store_true", help="measure nothing: simulate what was measured, anew"
    )
    arguments = parser.parse_args(argv)
    if arguments.rounds < 1:
        raise UserError(f"--rounds is {arguments.rounds}; it must be at least 1")

    def run(words: Sequence[str]) -> int:
        return run_child(words, _REPOSITORY)

    def say(line: str) -> None:
        print(line, flush=True)

    models = [] if arguments.simulate_only else models_to_calibrate()
    rounds = Rounds(arguments.rounds, arguments.results, models, run, say)
    if not arguments.simulate_only:
        rounds.measure()
    rounds.simulate(anew=arguments.simulate_only)
    records, _ = read_records(_REPOSITORY / arguments.results / SCENARIO)
    print(table(compare(record for record in records if record.content["config"].get("repeat"))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
