"""The decode bench: its sides compute the same tokens and its table follows from what they measured."""

from __future__ import annotations

import json

import judges
import pytest

from serving import bench_decode, bench_sides
from serving.bench_sides import HalvesSide
from serving.interface import ServedModel
from serving.spec import load_spec

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize("chunk", [5, 64])
@pytest.mark.parametrize("architecture", ["mixtral", "deepseek_v2"])
def test_the_halves_decode_what_the_judge_does(architecture, chunk, tiny_checkpoints, monkeypatch):
    directory = tiny_checkpoints[architecture]
    side = HalvesSide(ServedModel(load_spec(directory), directory), chunk)
    prompts = [tuple(range(10 * row, 10 * row + 12)) for row in range(3)]
    sampled: list[list[int]] = []
    step = side._step
    monkeypatch.setattr(side, "_step", lambda rows, length: sampled.append(step(rows, length)) or sampled[-1])
    rate, prefill_s = side.run(prompts, 6)
    assert rate > 0 and prefill_s > 0
    for tokens, prompt in zip(zip(*sampled[-6:], strict=True), prompts, strict=True):
        assert list(tokens) == judges.greedy_reference(directory, prompt, 6)


class FakeSide:
    """Answers from a list, one entry a round."""

    cores = 1

    def __init__(self, name, dtype, rates):
        self.name, self.dtype, self._rates = name, dtype, iter(rates)

    def run(self, prompts, new_tokens):
        return next(self._rates), 0.5

    def close(self):
        pass


class FakePeer(FakeSide):
    pass


def test_ratios_are_to_the_fastest_peer_and_the_warm_up_does_not_count(tiny_checkpoints, tmp_path, monkeypatch, capsys):
    sides = [
        FakeSide("halves", "bfloat16", [1.0, 200.0, 300.0, 100.0]),
        FakePeer("peer", "bfloat16", [999.0, 160.0, 160.0, 160.0]),
        FakePeer("peer", "float32", [999.0, 100.0, 100.0, 100.0]),
    ]
    monkeypatch.setattr(bench_decode, "open_sides", lambda *_: sides)
    monkeypatch.setattr(bench_decode, "TransformersSide", FakePeer)
    monkeypatch.setattr(bench_decode, "stream_bandwidth", lambda _: 1e9)
    out = tmp_path / "figures.json"
    arguments = ["--checkpoint", str(tiny_checkpoints["mixtral"]), "--batch", "2", "--dtype", "bfloat16"]
    assert bench_decode.main([*arguments, "--prompt-tokens", "30", "--rounds", "3", "--json", str(out)]) == 0
    ours, peer, reference = json.loads(out.read_text())
    assert (ours["median_tok_s"], ours["min_tok_s"], ours["max_tok_s"]) == (200.0, 100.0, 300.0)
    assert ours["prefill_tok_s"] == 120.0
    assert ours["floor_tok_s"] == peer["floor_tok_s"] == pytest.approx(2 * reference["floor_tok_s"])
    line = capsys.readouterr().out.splitlines()[2].split()
    assert "1.25" in line and "2.00" in line


@pytest.mark.parametrize("wrong", [["--new-tokens", "1"], ["--batch", "0"], ["--prompt-tokens", "0"]])
def test_sizes_that_give_no_rate_are_refused(wrong, tiny_checkpoints, capsys):
    assert bench_decode.main(["--checkpoint", str(tiny_checkpoints["mixtral"]), *wrong]) == 2
    assert capsys.readouterr().err.startswith("error: a decode rate needs")


def test_the_command_lets_real_sides_take_turns(tiny_checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_sides, "_MEMORY_BYTES", 64 << 20)  # all of it is touched at the start
    out = tmp_path / "figures.json"
    arguments = [
        "--checkpoint",
        str(tiny_checkpoints["mixtral"]),
        "--batch",
        "2",
        "--rounds",
        "1",
        "--new-tokens",
        "16",
    ]
    arguments += ["--transformers", "grouped_mm"]
    assert bench_decode.main([*arguments, "--prompt-tokens", "9", "--prefill-chunk", "4", "--json", str(out)]) == 0
    rows = json.loads(out.read_text())
    assert [row["side"].split(",")[0] for row in rows] == ["halves", "static", "transformers (grouped_mm)"]
    assert all(row["median_tok_s"] > 0 and row["prefill_tok_s"] > 0 for row in rows)
