"""The command that compares virtual KV memory with a flat arena: both compute the same, and its numbers follow."""

import json

import pytest

from serving.bench_memory import main

pytestmark = pytest.mark.cpu


def test_pages_and_arena_agree_and_the_loss_is_that_of_the_last_page(tmp_path, capsys):
    out = tmp_path / "rows.json"
    sizes = ["--size", "tiny", "--tokens", "100", "--batch", "2", "--rounds", "3", "--page-kib", "4", "64"]
    assert main(["--arch", "mixtral", "deepseek_v2", *sizes, "--json", str(out)]) == 0
    rows = json.loads(out.read_text())
    assert [(row["model"], row["page_bytes"]) for row in rows] == [
        (name, kib << 10) for name in ("mixtral", "deepseek_v2") for kib in (4, 64)
    ]
    for row in rows:
        assert min(row["map_us"], row["unmap_us"], row["virtual_us"], row["flat_us"]) > 0
    mixtral = rows[0]  # 100 tokens of 256 bytes in 3 layers: 7 pages of 4 KiB each
    assert mixtral["held_bytes"] == 3 * 7 * 4096
    assert mixtral["rounding_loss"] == pytest.approx(1 - 25600 / 28672)
    assert "flat arena" in capsys.readouterr().out
    assert main(["--arch", "mixtral", "--size", "tiny", "--tokens", "100000"]) == 2
