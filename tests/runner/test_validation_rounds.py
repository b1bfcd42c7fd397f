"""The protocol of the validation: calibrations around every piece, each run simulated with those of its own piece, and what is
stopped goes on with calibrations that are near."""

from itertools import groupby
from pathlib import Path

import pytest

from runner.validation_rounds import PIECES, Cell, Rounds
from serving.errors import UserError

pytestmark = pytest.mark.cpu

TWO = ((Cell("static", 1.0), Cell("swap", 1.0)), (Cell("static", 0.5), Cell("swap", 0.5)))


class Machine:
    """Carries out no command but remembers it, writes the files that it would, and fails at the one numbered `fails_at`."""

    def __init__(self, fails_at=-1):
        self.done, self.fails_at = [], fails_at

    def run(self, arguments):
        if len(self.done) == self.fails_at:
            return 1
        self.done.append(list(arguments))
        if "--out" in arguments:
            path = Path(arguments[arguments.index("--out") + 1])
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("")
        return 0

    def steps(self):
        """What each command was, in short."""
        return [_short(arguments) for arguments in self.done]


def _short(arguments):
    if arguments[0] == "bench.py":
        told = dict(word.split("=", 1) for word in arguments[1:])
        where = Path(told["backend.calibration"]).stem if "backend.calibration" in told else "real"
        return f"{told['system']} {told['workload.rate']} {told['repeat']} {where}"
    return " ".join(Path(word).stem for word in arguments[2:] if word == "join" or word.endswith(".json"))


def rounds(machine, tmp_path, count=1):
    return Rounds(count, tmp_path, ["m=/c"], machine.run, lambda line: None, TWO)


def test_a_round_calibrates_around_every_piece_and_simulates_with_what_is_around(tmp_path):
    machine = Machine()
    made = rounds(machine, tmp_path, 2)
    made.measure()
    one = [
        "piece-1-before", "static 1 {} real", "swap 1 {} real", "piece-1-after", "join piece-1 piece-1-before piece-1-after",
        "static 0.5 {} real", "swap 0.5 {} real", "piece-2-after", "join piece-2 piece-1-after piece-2-after",
    ]  # fmt: skip
    assert machine.steps() == [step.format(number) for number in (1, 2) for step in one]
    assert {Path(words[-1]).parent.name for words in machine.done if "join" in words} == {"round-1", "round-2"}
    machine.done.clear()
    made.simulate()
    assert machine.steps()[:3] == ["static 1 1 piece-1", "swap 1 1 piece-1", "static 0.5 1 piece-2"]
    assert len(machine.done) == 8 and not any("force=true" in words for words in machine.done)


@pytest.mark.parametrize("fails_at", range(9))
def test_what_was_stopped_goes_on_with_no_run_between_calibrations_of_another_time(tmp_path, fails_at):
    first, second = Machine(fails_at), Machine()
    with pytest.raises(UserError, match="the same command goes on"):
        rounds(first, tmp_path).measure()
    rounds(second, tmp_path).measure()
    pieces_left = 2 if fails_at < 5 else 1
    assert len(second.done) == {2: 9, 1: 5}[pieces_left]
    assert second.steps()[0] == f"piece-{3 - pieces_left}-before"
    assert all("force=true" in words for words in second.done if words[0] == "bench.py")
    third = Machine()
    rounds(third, tmp_path).measure()
    assert third.done == []


def test_only_what_was_measured_is_simulated_anew(tmp_path):
    machine = Machine(fails_at=6)
    with pytest.raises(UserError):
        rounds(machine, tmp_path).measure()
    machine = Machine()
    rounds(machine, tmp_path).simulate(anew=True)
    assert machine.steps() == ["static 1 1 piece-1", "swap 1 1 piece-1"]
    assert all("force=true" in words for words in machine.done)


def test_every_system_runs_once_at_every_rate():
    cells = sorted((cell.system, cell.rate_rps) for piece in PIECES for cell in piece)
    assert len(set(cells)) == len(cells)
    assert {rates for rates in (tuple(r for _, r in own) for _, own in groupby(cells, lambda one: one[0]))} == {
        (0.5, 1.0)
    }
