"""The cost model against measured silicon, and its commands. The measured rows are not in the repository."""

from __future__ import annotations

import json

import pytest

from serving.cost.__main__ import main
from serving.cost.check import check
from serving.cost.hardware import load_hardware
from serving.cost.operators import CostModel, measured_tables
from serving.cost.silicon import read_rows, require_silicon, silicon_directory
from serving.errors import UserError

pytestmark = pytest.mark.cpu

needs_silicon = pytest.mark.skipif(
    silicon_directory() is None, reason="measured rows absent: set SILICON_DIR or put them at ../shared/silicon"
)


@pytest.fixture(scope="module")
def cells():
    return check(require_silicon())


@needs_silicon
def test_decode_operators_are_within_the_target_on_both_cards(cells):
    judged = {(cell.card, cell.operator): cell.roofline for cell in cells if cell.has_target}
    assert len(judged) == 8
    missed = {key: (e.median, e.p90) for key, e in judged.items() if not e.within_target}
    assert not missed


@needs_silicon
def test_the_other_forms_are_reported_beside(cells):
    for cell in cells:
        assert cell.table.rows == cell.roofline.rows > 0
        assert cell.moved.rows <= cell.roofline.rows


@needs_silicon
def test_a_gemm_fit_moves_to_the_other_card_within_a_fifth(cells):
    moved = [cell.moved.median for cell in cells if cell.operator == "gemm" and cell.variant == "all"]
    assert max(moved) < 0.2


@needs_silicon
def test_fit_writes_what_is_shipped(tmp_path, capsys):
    assert main(["fit", "--out", str(tmp_path)]) == 0
    from serving.cost.fitted_set import read_fitted, shipped

    for card in ("a100-80gb", "h200"):
        fresh, kept = read_fitted(tmp_path / f"{card}.json"), shipped(card)
        assert fresh.variants.keys() == kept.variants.keys()
        assert fresh.provenance["files"] == kept.provenance["files"]


@needs_silicon
def test_a_table_of_measured_rows_returns_them():
    card, directory = load_hardware("h200"), require_silicon()
    model = CostModel(card, tables=measured_tables(card, directory))
    rows = read_rows(directory, "h200", "gemm")
    index = 12345
    m, n, k = (int(rows.columns[name][index]) for name in ("m", "n", "k"))
    assert model.gemm_s(m, n, k) == pytest.approx(rows.seconds[index], rel=1e-6)
    with pytest.raises(UserError, match="h20: no measured rows; cards that have them: a100-80gb, h200"):
        measured_tables(load_hardware("h20"), directory)


def test_silicon_that_is_not_there_is_one_clear_line(tmp_path, capsys):
    with pytest.raises(UserError, match="set SILICON_DIR or pass --silicon DIR"):
        require_silicon(tmp_path / "none")
    assert main(["check", "--silicon", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.startswith("error: measured rows not found")


def test_a_directory_without_rows_names_the_file(tmp_path, capsys):
    assert main(["check", "--silicon", str(tmp_path)]) == 2
    assert "a100_80gb_gemm.parquet: no such file" in capsys.readouterr().err


def test_commands_print_tables(capsys):
    assert main(["table1"]) == 0
    assert capsys.readouterr().out.count("same") == 5
    assert main(["figures"]) == 0
    assert "144.41" in capsys.readouterr().out
    assert main(["hardware"]) == 0
    assert "h200" in capsys.readouterr().out
    assert main(["hardware", "l40s"]) == 0
    assert "864 GB/s" in capsys.readouterr().out
    assert main(["hardware", "b300"]) == 2
    assert "known: a100-40gb" in capsys.readouterr().err


@needs_silicon
def test_check_writes_its_cells(tmp_path, capsys):
    path = tmp_path / "cells.json"
    assert main(["check", "--json", str(path)]) == 0
    records = json.loads(path.read_text())
    assert sum(record["within_target"] is True for record in records) == 8
