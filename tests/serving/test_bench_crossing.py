"""The command that measures a crossing, over both transports: rows come back as they were, and times are ordered."""

import json

import pytest

from serving.bench_crossing import main

pytestmark = pytest.mark.cpu


def test_both_transports_return_what_was_sent(capsys):
    arguments = ["--rows", "1", "3", "--hidden", "64", "--rounds", "20", "--transport", "shared-memory", "gloo"]
    assert main([*arguments, "--json"]) == 0
    table = json.loads(capsys.readouterr().out)["round_trip"]
    assert [(row["transport"], row["rows"]) for row in table] == [
        ("shared-memory", 1), ("shared-memory", 3), ("gloo", 1), ("gloo", 3),
    ]  # fmt: skip
    for row in table:
        assert 0 < row["p50_us"] <= row["p90_us"] <= row["p99_us"]
