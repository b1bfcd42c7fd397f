"""The switch that shortens every command: one cell, one second, and nothing else changed."""

from __future__ import annotations

import pytest

from runner.short import is_short, shortened

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize(
    ("arguments", "short"),
    [
        (["conf=smoke"], ["conf=smoke", "workload.duration_s=1"]),
        (["-m", "system=crosspool,static", "a.b=1,2"], ["-m", "system=crosspool", "a.b=1", "workload.duration_s=1"]),
        (["workload.duration_s=60"], ["workload.duration_s=1"]),
        (["-m", "bins=[4-8K],[8-16K]"], ["-m", "bins=[4-8K],[8-16K]", "workload.duration_s=1"]),
        (["--help"], ["--help"]),
    ],
)
def test_the_first_cell_for_a_second(arguments, short):
    assert shortened(arguments) == short


@pytest.mark.parametrize(("value", "short"), [("", False), ("0", False), ("1", True)])
def test_it_is_off_unless_set(monkeypatch, value, short):
    monkeypatch.setenv("CROSSPOOL_SHORT", value)
    assert is_short() is short
