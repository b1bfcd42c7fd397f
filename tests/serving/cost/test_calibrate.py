"""Calibration: stage costs from measured rows, and the micro-benchmarks themselves on a model of a few kilobytes."""

from __future__ import annotations

import json

import numpy as np
import pytest

from serving.cost.__main__ import main
from serving.cost.anchoring import anchored, levels, mean_levels
from serving.cost.calibrated import (
    CalibratedStages,
    MeasuredRow,
    calibration,
    read_calibration,
    rows_by_operator,
    write_calibration,
)
from serving.cost.table1 import published_spec
from serving.errors import UserError

pytestmark = pytest.mark.cpu

RATES = {"memory_bandwidth": 12e9, "shared_memory_bandwidth": 20e9, "fp32_flops": 90e9, "bf16_flops": 150e9}
SLOWED = {"mixtral-8x7b": {"stage_decode": 1.3}}
TINY = {
    "model_type": "deepseek_v2",
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "n_routed_experts": 6,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": None,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "max_position_embeddings": 512,
    "vocab_size": 128,
    "torch_dtype": "float32",
}


def made_rows(name: str, hidden: float, scale: float = 1.0) -> list[MeasuredRow]:
    """Rows of stages that follow lines: decode 100 + 10 B + 0.1 B L, FFN 20 + 5 T + 50 D, in microseconds."""
    rows = []

    def add(operator: str, us: float, **columns: float) -> None:
        rows.append(MeasuredRow(operator, name, {"hidden_size": hidden, **columns}, scale * us * 1e-6))

    for batch in (1, 2, 4, 8):
        for context in (16, 256, 1024):
            add("stage_decode", 100 + 10 * batch + 0.1 * batch * context, batch_size=batch, context=context)
    for new in (16, 64, 256):
        for past in (0, 256):
            add("stage_prefill", 100 + 20 * new + 0.01 * (past + new), isl=new, past=past)
    for tokens, hit in ((1, 2.0), (2, 3.5), (8, 7.2), (64, 8.0)):
        add("stage_routed", 20 + 5 * tokens + 50 * hit, num_tokens=tokens, distinct=hit)
    for count in (1, 4, 16):
        add("stage_dense", 30 + 5 * count, rows=count)
        add("stage_end", 200 + 40 * count, rows=count)
        add("stage_begin", 5 + 0.1 * count, rows=count)
    return rows


@pytest.fixture
def made():
    spec = published_spec("mixtral-8x7b")
    return spec, calibration(
        RATES, "float32", rows_by_operator(made_rows(spec.name, 4096.0)), {"machine": "made"}, SLOWED
    )


def test_measured_points_come_back(made):
    spec, found = made
    stages = CalibratedStages(spec, found)
    assert stages.attention(4, 4 * 256).device_s == pytest.approx(242.4e-6, rel=1e-3)
    assert stages.ffn(0, 8).device_s == pytest.approx(420e-6, rel=1e-3)
    assert stages.head(4).device_s == pytest.approx(360e-6, rel=1e-3)
    assert stages.prefill_attention(64, 256).device_s == pytest.approx((100 + 1280 + 3.2) * 1e-6, rel=1e-3)


def test_unmeasured_sizes_are_interpolated_and_extrapolated_along_the_line(made):
    stages = CalibratedStages(*made)
    assert stages.attention(3, 3 * 500).device_s == pytest.approx((100 + 30 + 150) * 1e-6, rel=0.05)
    assert stages.attention(16, 16 * 4096).device_s == pytest.approx((100 + 160 + 6553.6) * 1e-6, rel=0.05)


def test_a_step_sums_its_stages_and_needs_no_launches(made):
    spec, found = made
    stages = CalibratedStages(spec, found)
    step = stages.decode_step(2, 512)
    layers = spec.num_layers * (stages.attention(2, 512).device_s + stages.ffn(0, 2).device_s)
    assert step.device_s == pytest.approx(layers + stages.head(2).device_s + stages.embedding(2).device_s)
    assert stages.launched_s(step) == step.device_s
    assert step.work.bytes > 0 < step.load().bytes


def test_a_mixed_step_pays_once_for_what_is_done_once(made):
    stages = CalibratedStages(*made)
    decode, chunk = stages.attention(4, 1024), stages.prefill_attention(64, 0)
    mixed = stages.mixed_attention(4, 1024, [(64, 0)])
    assert mixed.device_s == pytest.approx(decode.device_s + chunk.device_s - stages.attention(1, 1).device_s)
    assert stages.mixed_attention(4, 1024, []) == decode
    assert stages.mixed_attention(0, 0, [(64, 0)]) == chunk
    assert stages.mixed_attention(0, 0, []).device_s == 0


def test_the_machine_it_measured_describes_the_hardware(made):
    _, found = made
    assert found.hardware.memory_bandwidth == 12e9
    assert "measured by calibrate on made" in found.hardware.sources["memory_bandwidth"]


def test_a_model_that_was_not_measured_lists_those_that_were(made):
    _, found = made
    with pytest.raises(UserError, match="'qwen3-30b-a3b' was not calibrated; known: mixtral-8x7b"):
        CalibratedStages(published_spec("qwen3-30b-a3b"), found)


def test_a_calibration_survives_its_file(made, tmp_path):
    spec, found = made
    write_calibration(tmp_path / "cal.json", found, RATES)
    again = read_calibration(tmp_path / "cal.json")
    assert again.hardware == found.hardware
    assert CalibratedStages(spec, again).beside_stream("stage_decode") == 1.3
    assert CalibratedStages(spec, again).beside_stream("stage_routed") == 1.0
    steps = [CalibratedStages(spec, each).decode_step(3, 1000).device_s for each in (found, again)]
    assert steps[0] == steps[1]
    (tmp_path / "broken.json").write_text("[]")
    with pytest.raises(UserError, match="broken.json: not a calibration"):
        read_calibration(tmp_path / "broken.json")
    with pytest.raises(UserError, match="none.json: no such file; `python -m serving.cost calibrate"):
        read_calibration(tmp_path / "none.json")


def test_the_stages_of_a_small_model_can_be_measured(tmp_path):
    from serving.cost.calibrate import load_halves, measure, stage_points
    from serving.cost.worker_steps import measure_steps
    from serving.interface import ServedModel
    from serving.spec import spec_from_config

    spec = spec_from_config(TINY, "tiny")
    model = ServedModel(spec, tmp_path, "float32", dummy=True)
    halves = load_halves(model)
    points = list(stage_points(model, *halves, kv_budget_bytes=2**20))
    operators = {point.operator for point in points}
    assert operators == {f"stage_{name}" for name in ("decode", "prefill", "routed", "dense")}
    assert max(point.columns.get("context", 0) for point in points) <= 512
    rows, lost = measure(points, rounds=1, seconds_per_point=0.0)
    assert 0 <= lost < 1
    steps = measure_steps(model, *halves, rounds=1, decode_steps=2, lone_steps=2)
    rows += steps.once
    assert {row.operator for row in rows} - operators == {"stage_begin", "stage_end"}
    assert all(row.seconds > 0 for row in rows)
    found = calibration(RATES, "float32", rows_by_operator(rows), {})
    assert {operator for operator, _ in levels(found, steps.layers)} == operators
    seconds = CalibratedStages(spec, found).decode_step(2, 64).device_s
    assert np.isfinite(seconds) and 0 < seconds < 1


def test_calibrate_writes_a_file(tmp_path, capsys, monkeypatch):
    import os
    from contextlib import nullcontext

    import torch

    from serving.cost import calibrate, machine_rates

    monkeypatch.setattr(
        machine_rates, "stream_rates", lambda: {"memory_bandwidth": 1e9, "shared_memory_bandwidth": 2e9}
    )
    monkeypatch.setattr(machine_rates, "crossing_rates", lambda: {"crossing_lowered_s": 2e-6})
    monkeypatch.setattr(calibrate, "streaming", lambda core: nullcontext(lambda on: None))
    monkeypatch.setattr(calibrate, "measure_beside_stream", lambda *_: {"stage_decode": 1.2})
    monkeypatch.setattr(machine_rates, "product_rates", lambda: {"fp32_flops": 1e9, "bf16_flops": 2e9})
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text(json.dumps(TINY))
    cores, threads = os.sched_getaffinity(0), torch.get_num_threads()
    arguments = ["calibrate", "--out", str(tmp_path / "cal.json"), "--model", str(tmp_path / "tiny"), "--dummy"]
    try:
        assert main([*arguments, "--rounds", "1", "--point-ms", "0", "--script-rounds", "1"]) == 0
    finally:
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(threads)
    assert read_calibration(tmp_path / "cal.json").models() == ("tiny",)
    assert "tiny: " in capsys.readouterr().out


def test_calibrate_refuses_what_it_cannot_do(tmp_path, capsys):
    out = ["calibrate", "--out", str(tmp_path / "cal.json")]
    assert main([*out, "--model", str(tmp_path)]) == 2
    assert "config.json: no such file" in capsys.readouterr().err
    assert main(["stream", "--core", "4096"]) == 2
    assert "core 4096 cannot be used" in capsys.readouterr().err


def test_calibrations_of_several_times_join_to_their_mean(tmp_path):
    for number, scale in enumerate((1.0, 1.5, 2.0)):
        rows = rows_by_operator(made_rows("mixtral-8x7b", 4096.0, scale))
        rates = {name: rate * scale for name, rate in RATES.items()}
        slowed = {"mixtral-8x7b": {"stage_decode": 1 + scale}}
        spread = {"mixtral-8x7b": [1 - scale / 4, 1 + scale / 4]}
        found = calibration(rates, "float32", rows, {"machine": "here", "date": "today"}, slowed, spread)
        write_calibration(tmp_path / f"{number}.json", found, rates)
    files = [str(tmp_path / f"{number}.json") for number in range(3)]
    assert main(["join", "--out", str(tmp_path / "all.json"), *files]) == 0
    joined, middle = read_calibration(tmp_path / "all.json"), read_calibration(files[1])
    assert joined.hardware.memory_bandwidth == pytest.approx(1.5 * RATES["memory_bandwidth"])
    assert joined.beside_stream == {"mixtral-8x7b": {"stage_decode": 2.5}}
    assert joined.spread == {"mixtral-8x7b": [0.625, 1.375]}
    for name, rows in middle.rows.items():
        np.testing.assert_allclose(joined.rows[name].seconds, rows.seconds)


def test_calibrations_of_different_points_do_not_join(tmp_path, capsys):
    for name in ("mixtral-8x7b", "other"):
        found = calibration(RATES, "float32", rows_by_operator(made_rows(name, 4096.0)), {}, SLOWED)
        write_calibration(tmp_path / f"{name}.json", found, RATES)
    files = [str(tmp_path / f"{name}.json") for name in ("mixtral-8x7b", "other")]
    assert main(["join", "--out", str(tmp_path / "all.json"), *files]) == 2
    assert "different points" in capsys.readouterr().err
    assert not (tmp_path / "all.json").exists()


def test_a_point_is_the_mean_of_its_runs_in_interleaved_rounds():
    from serving.cost import calibrate

    done = []

    def point(number: int) -> calibrate.Point:
        return calibrate.Point("stage", "m", {}, lambda: done.append(number) or 1000 * number * len(done), repeats=2)

    rows, _ = calibrate.measure([point(1), point(2)], rounds=2, seconds_per_point=0.0)
    assert done == [1, 1, 2, 2] * 2  # the first of two runs does not count
    assert [row.seconds for row in rows] == pytest.approx([(2 + 6) / 2 * 0.5e-6, 2 * (4 + 8) / 2 * 0.5e-6])


def test_points_are_taken_at_the_level_that_stages_have_on_a_worker(made):
    spec, found = made
    ratio, common = {1: 0.5, 4: 2.0}, {"hidden_size": 4096.0}
    columns = {rows: {**common, "batch_size": float(rows), "context": 256.0} for rows in ratio}
    seconds_of = found.seconds_of()
    layers = [
        MeasuredRow("stage_decode", spec.name, columns[rows], by * seconds_of("stage_decode", spec.name, columns[rows]))
        for rows, by in ratio.items()
    ]
    ratios = levels(found, layers)
    assert ratios == {("stage_decode", spec.name): {1.0: pytest.approx(0.5), 4.0: pytest.approx(2.0)}}
    assert mean_levels(ratios) == {("stage_decode", spec.name): pytest.approx(1.0)}
    rows = anchored(found.rows, ratios)
    expected = {1.0: 0.5, 2.0: 1.0, 4.0: 2.0, 8.0: 2.0}  # between on a logarithmic scale, beyond as at the end
    by = [expected[batch] for batch in found.rows["stage_decode"].columns["batch_size"]]
    for name, mine in found.rows.items():
        np.testing.assert_allclose(rows[name].seconds, mine.seconds * (by if name == "stage_decode" else 1.0))
    stages = CalibratedStages(spec, calibration(RATES, "float32", rows, {}))
    assert stages.attention(4, 4 * 256).device_s == pytest.approx(
        2.0 * seconds_of("stage_decode", spec.name, columns[4])
    )
