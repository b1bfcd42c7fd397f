"""The bench: nothing wrong is timed, the exit code says so, records hold what was printed; and the tuned files' use."""

from __future__ import annotations

import contextlib
import json

import pytest
import torch

from kernels import tuning
from kernels.bench import __main__ as bench
from kernels.bench import tune
from kernels.bench.cases import CHECKS, CPU_CASES, CUDA_CASES, Case
from kernels.bench.measure import Ceilings
from kernels.bench.problems import Problem

pytestmark = pytest.mark.cpu


@pytest.fixture(autouse=True)
def _no_ceilings(monkeypatch):
    """Measuring them takes a gigabyte and a second; here they are given."""
    monkeypatch.setattr(bench, "measure_ceilings", lambda *_: Ceilings(1e10, 1e11, 0.0, 0.0))


def test_a_right_operator_is_timed_and_recorded(tmp_path, capsys):
    assert bench.main(["rms_norm", "--device", "cpu", "--out", str(tmp_path)]) == 0
    assert "GB/s" in capsys.readouterr().out
    record = json.loads((tmp_path / "kernels.json").read_text())
    (row,) = record["rows"]
    assert row["op"] == "rms_norm"
    assert row["bytes"] == 4 * 8 * 512 * 4
    assert row["seconds"] > 0
    assert record["ceilings"]["bytes_per_s"] == 1e10
    assert (tmp_path / "roofline.png").stat().st_size > 1000


def test_a_wrong_operator_is_refused(monkeypatch, capsys):
    from kernels import rms_norm

    right = rms_norm.add_rms_norm

    def wrong(*arguments):
        normed, total = right(*arguments)
        return normed * 1.01, total

    monkeypatch.setattr(rms_norm, "add_rms_norm", wrong)
    assert bench.main(["rms_norm", "--device", "cpu"]) == 1
    printed = capsys.readouterr()
    assert "FAILED: relative error 1.0e-02" in printed.out
    assert "rms_norm: not timed, a check failed" in printed.err
    assert "8x512" not in printed.out


def test_an_unknown_operator_names_the_known_ones(capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.main(["rmsnorm"])
    assert stopped.value.code == 2
    assert "unknown operator 'rmsnorm'; known: rms_norm, rope" in capsys.readouterr().err


def test_every_timed_operator_is_checked():
    assert {case.op for case in (*CPU_CASES, *CUDA_CASES)} <= {case.op for case in CHECKS}


def test_tuned_sizes_replace_defaults_for_their_key_and_dtype_only(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "TUNED_DIRECTORY", tmp_path)
    device = torch.device("cpu")
    tuning.save(device, {"op/float32_a": {"BLOCK": 64}}, tmp_path)
    tuning.save(device, {"op/float32_b": {"BLOCK": 32}}, tmp_path)
    default = {"BLOCK": 16, "num_warps": 4}
    like = torch.zeros(1)
    try:
        assert tuning.config("op", "a", like, default) == {"BLOCK": 64, "num_warps": 4}
        assert tuning.config("op", "b", like, default) == {"BLOCK": 32, "num_warps": 4}
        assert tuning.config("op", "a", like.bfloat16(), default) == default
        assert tuning.config("op", "c", like, default) == default
    finally:
        tuning._table.cache_clear()


@pytest.fixture
def tuned(monkeypatch):
    """`tuned({chunk: [{block: seconds}, ..]})`: what the tuner finds for one key's chunks, each after several prefixes, by a clock
    that reads a call's time from its block. The default is block 0; 1 and 2 are tried."""
    pytest.importorskip("triton")
    monkeypatch.setattr(tune, "candidates", lambda operator, rows: [[{"BLOCK": 1}, {"BLOCK": 2}]])
    clock = {}
    monkeypatch.setattr(tune, "seconds_per_call", lambda variants, device: variants[0]() and clock["seconds"])

    def case(chunk: str, after: int, seconds: dict[int, float]) -> Case:
        def build(device: torch.device, dtype: torch.dtype) -> Problem:
            def call() -> tuple[torch.Tensor]:
                clock["seconds"] = seconds[tuning.config("prefill_gqa", "kh1", out, {"BLOCK": 0})["BLOCK"]]
                return (out,)

            out = torch.ones(1)
            return Problem([call], lambda _: (out,), 1, 1)

        return Case("prefill_gqa", f"{chunk} after {after}", build, chunk=chunk)

    def find(chunks: dict[str, list[dict[int, float]]]) -> dict[str, dict[str, int]]:
        cases = [case(chunk, after, mine) for chunk, times in chunks.items() for after, mine in enumerate(times)]
        return tune.tune(cases, torch.device("cpu"), torch.float32, 60.0)

    return find


def test_what_a_long_prefix_costs_outweighs_what_none_saves(tuned):
    """Block 1 has the least product of times: a fifth less after no token, a third more after many."""
    times = [{0: 5.0, 1: 4.0, 2: 6.0}, {0: 17.0, 1: 15.0, 2: 18.0}, {0: 96.0, 1: 129.0, 2: 90.0}]
    assert tuned({"16 rows": times}) == {"prefill_gqa/float32_kh1": {"BLOCK": 2}}
    assert tuned({"16 rows": [{**mine, 2: 99.0} for mine in times]}) == {}


def test_chunks_of_different_sizes_count_alike(tuned):
    """The larger chunk takes longer, so in a sum over both the smaller one would not matter."""
    small, large = [{0: 2.0, 1: 1.0, 2: 2.2}, {0: 10.0, 1: 5.0, 2: 11.0}], [{0: 900.0, 1: 990.0, 2: 890.0}]
    assert tuned({"16 rows": small, "256 rows": large}) == {"prefill_gqa/float32_kh1": {"BLOCK": 1}}


def test_a_wrong_configuration_is_not_chosen_however_fast(tuned, monkeypatch):
    errors = iter([0.0, 1.0, 0.0])
    monkeypatch.setattr(tune, "worst_error", lambda problem, expected: next(errors))
    assert tuned({"16 rows": [{0: 5.0, 1: 1.0, 2: 4.0}]}) == {"prefill_gqa/float32_kh1": {"BLOCK": 2}}


def test_candidates_have_the_time_that_is_given_whatever_compiling_takes(tuned, monkeypatch):
    now = [0.0]

    def wait(seconds: float) -> float:
        now[0] += seconds
        return seconds

    @contextlib.contextmanager
    def compiling():
        yield
        wait(1000.0)

    monkeypatch.setattr(tune.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(tune, "compiling_ahead", compiling)
    monkeypatch.setattr(tune, "worst_error", lambda problem, expected: wait(25.0) - 25.0)
    times = [{0: 5.0, 1: 4.0, 2: 3.0}]
    assert tuned({"16 rows": times}) == {
        "prefill_gqa/float32_kh1": {"BLOCK": 2}
    }  # within its 60 s: 25 for each of three
    monkeypatch.setattr(tune, "worst_error", lambda problem, expected: wait(35.0) - 35.0)
    assert tuned({"16 rows": times}) == {"prefill_gqa/float32_kh1": {"BLOCK": 1}}  # the last would begin after 70 s
