"""The command that measures in-flight batches and lowered control: its cells really run, and its numbers follow."""

import json

import pytest

from crosspool.bench_pipeline import main, ratio_interval

pytestmark = pytest.mark.cpu


def test_every_cell_runs_and_says_what_the_devices_waited_for(tmp_path, capsys):
    out = tmp_path / "runs.json"
    sizes = ["--models", "mixtral:tiny", "qwen3_moe:tiny", "--tokens", "48", "--batch", "2", "--runs", "1"]
    assert main([*sizes, "--lanes", "1", "--memory-mib", "64", "--json", str(out)]) == 0
    runs = json.loads(out.read_text())
    assert [(run["cell"]["lanes"], run["cell"]["control"]) for run in runs] == [
        (1, "host"), (1, "lowered"),
    ]  # fmt: skip
    for run in runs:
        assert run["tokens_per_s"] > 0
        assert min(run["attention_us"], run["ffn_us"]) > 0
        for side in run["idle"].values():
            assert sum(side.values()) == pytest.approx(1)
    table = capsys.readouterr().out
    assert "decode batch 2, 1 runs a cell" in table
    assert "waiting for FFN" in table


def test_ratios_of_paired_runs_have_an_interval_around_their_mean():
    mean, low, high = ratio_interval([20.0, 22.0, 18.0], [10.0, 10.0, 10.0])
    assert low < mean < high
    assert mean == pytest.approx((20 * 22 * 18) ** (1 / 3) / 10)
    assert ratio_interval([3.0], [2.0])[0] == 1.5
