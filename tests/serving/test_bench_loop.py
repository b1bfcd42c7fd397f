"""The benchmark of a card worker's loop: it times every step that it is asked for, whatever the batch."""

import pytest

from serving.bench_loop import main, measure

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize("batch", [1, 3])
def test_every_step_has_a_gap_before_the_next(batch):
    gaps = measure(batch, step_s=0.0002, steps=40)
    assert len(gaps) == 40 and min(gaps) > 0


def test_the_table_has_a_row_a_batch(capsys):
    assert main(["--batch", "2", "1", "--step-ms", "0.2", "--steps", "20", "--rounds", "2"]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert "us: median" in head
    assert [row.split()[0] for row in rows] == ["2", "1"] and all(len(row.split()) == 5 for row in rows)


@pytest.mark.parametrize("wrong", [["--steps", "0"], ["--batch", "0"], ["--step-ms", "0"], ["--steps", "5000"]])
def test_what_cannot_be_timed_is_one_clear_line(wrong, capsys):
    assert main(wrong) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
