"""Our engine's costs on a card, from made-up steps: those come back, and a step in parts costs what its parts do."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from pathlib import Path

import pytest

from serving import registry
from serving.batching import StepLimits
from serving.cost import measured_card
from serving.cost.__main__ import main
from serving.cost.calibrated import read_calibration
from serving.cost.card_steps import KINDS, calibrate_card, fitting_half, judge, read_steps
from serving.cost.cards import hardware_of, stages_on
from serving.cost.contention import Contention, Load, slowdowns
from serving.cost.engine_kernels import step_kernels
from serving.cost.hardware import load_hardware
from serving.cost.measured_card import CardStages, graph_rows, shipped_measured
from serving.cost.operators import CostModel
from serving.cost.stages import StageCosts
from serving.cost.table1 import published_spec
from serving.errors import UserError
from serving.gpu_suite.seeded import seeded
from serving.gpu_suite.serve import replay
from serving.interface import Cluster, Demand, Device, Request
from serving.parallel.costs import GroupCosts, StepShape
from serving.parallel.group import GroupPlan
from serving.part_shapes import shapes_of, smallest
from serving.sim.backend import simulate_card
from serving.sim.costs import StageTimes

pytestmark = pytest.mark.cpu

MODELS = ("deepseek-v2-lite", "qwen3-30b-a3b")
HOST_MS = 0.1  # of a part, beside its sides


def part_ms(spec, rows: int, there: int, chunk: bool) -> dict[str, float]:
    """A step of one part as a made-up card takes it: microseconds of a layer that grow with rows, tokens and experts."""
    padded = graph_rows(rows, chunk)
    attention_us = 40 + 0.2 * padded + (0.002 * padded * (there + padded) if chunk else 0.0005 * rows * there)
    routed_us, dense = 20 + 0.1 * padded + 3 * spec.moe.distinct_experts(padded), len(spec.dense_layers)
    dense_ms = dense * (30 + 0.5 * padded) / 1e3
    attention_ms, ffn_ms = spec.num_layers * attention_us / 1e3, (spec.num_layers - dense) * routed_us / 1e3 + dense_ms
    sides = {"attention_ms": attention_ms, "ffn_ms": ffn_ms, "dense_ms": dense_ms}
    return {"step_ms": attention_ms + ffn_ms + HOST_MS, **sides}


def made_row(name: str, batch: int = 0, context: int = 0, chunks: int = 0, rows: int = 0, past: int = 0) -> dict:
    """Decode rows share the pass of the first prompt: they add their own rows and tokens to it, and little else."""
    spec = published_spec(name)
    parts = [part_ms(spec, rows, past, True)] * chunks or [part_ms(spec, batch, context, False)]
    told = parts[0] if len(parts) == 1 else {"step_ms": sum(part["step_ms"] for part in parts)}
    if batch and chunks:
        added_ms = spec.num_layers * batch * (0.3 + 0.0005 * context) / 1e3
        told = {name: ms + added_ms * (name in ("step_ms", "attention_ms")) for name, ms in told.items()}
    shape = {"batch": batch, "context": context, "chunks": chunks, "rows": rows, "past": past}
    return {"model": name, "control": "fused", **shape, **told}


@pytest.fixture
def file(tmp_path):
    rows = []
    for name in MODELS:
        rows += [made_row(name, 0, 0, 1, n, past) for n in (16, 32, 64, 100, 128, 256) for past in (0, 512, 2048)]
        rows += [made_row(name, batch, context) for batch in (1, 2, 3, 4) for context in (128, 1024, 8192)]
        rows += [made_row(name, batch, 1024, 1, 256, 512) for batch in (1, 2, 3)] + [made_row(name, 0, 0, 2, 100, 512)]
    rows += [{**made_row(MODELS[0], 1, 128), "control": "host", "step_ms": 99.0}, {"model": "x", "error": "no"}]
    path = tmp_path / "steps.json"
    path.write_text(json.dumps({"hardware": ["made up"], "driver": "1", "rows": rows}))
    return path


def test_steps_held_out_are_predicted_and_the_card_before_is_judged_too(file):
    steps, measured_on = read_steps(file)
    assert len(steps) == 2 * 34 and measured_on == {"hardware": ["made up"], "driver": "1"}
    half = fitting_half(steps)
    assert 0.4 < len(half) / len(steps) < 0.6 and "several prompts" not in {step.kind for step in half}
    judged = judge("h200", steps, calibrate_card("h200", half, {}))
    assert {(one.model, one.kind) for one in judged if one.held_out} == {
        (name, kind) for name in MODELS for kind in KINDS
    }
    assert all(one.after.median < 0.02 and one.after.p90 < 0.05 for one in judged), judged
    assert sum(one.before.rows for one in judged) == len(steps)
    assert any(abs(one.bias_before) > 0.1 for one in judged)


def test_decode_rows_go_with_the_first_prompt_and_other_prompts_alone(file):
    steps, _ = read_steps(file)
    stages = CardStages(
        dataclasses.replace(published_spec(MODELS[1]), name="any name"), calibrate_card("h200", steps, {})
    )
    decode, chunk, same_graph = (
        stages.mixed_step(batch, 1024 * batch, chunks)
        for batch, chunks in ((3, []), (0, [(100, 512)]), (0, [(128, 512)]))
    )
    both, two = stages.mixed_step(3, 3072, [(100, 512)]), stages.mixed_step(0, 0, [(100, 512), (100, 512)])
    assert chunk.device_s < both.device_s < 0.9 * (decode.device_s + chunk.device_s)
    assert two.device_s == pytest.approx(2 * chunk.device_s)
    assert chunk.device_s == same_graph.device_s  # of 128 rows
    assert stages.passes(3, []) == (3,) and stages.passes(9, []) == (10,)
    assert stages.passes(3, [100, 7]) == (3 + 128, 16)
    times, group = StageTimes(stages), GroupCosts(stages, GroupPlan(("a",)))
    assert times.passes((1, 1, 1, 100)) == (131,)
    assert group.step_s([StepShape(3, 3072, ((100, 512),))]) == pytest.approx(both.device_s)
    with pytest.raises(UserError, match=r"measured whole, and it lies on 2 devices; backend.card=h200"):
        stages.share(2)
    assert stages.decode_step(3, 3072).device_s == decode.device_s > stages.decode_step(2, 3072).device_s


def test_a_whole_step_of_other_costs_is_one_pass_of_all_rows():
    stages = StageCosts(published_spec(MODELS[0]), CostModel(load_hardware("h200")))
    apart = stages.decode_step(3, 600), stages.prefill_step(64, 128)
    assert stages.passes(3, [100, 7]) == (110,)
    assert stages.mixed_step(3, 600, [(64, 128)]).device_s < 0.9 * sum(step.device_s for step in apart)


def test_parts_have_the_rows_of_the_engines_graphs():
    shapes = shapes_of(StepLimits(max_batch=8, prefill_chunk=256), 1 << 20)
    for rows in (1, 2, 3, 5, 8):
        assert graph_rows(rows, False) == smallest(shapes, rows, 0).rows
    for rows in (5, 16, 17, 100, 129, 256):
        assert graph_rows(rows, True) == smallest(shapes, 0, rows).rows


def test_the_command_judges_and_writes_what_it_made(file, tmp_path, capsys):
    out = tmp_path / "made-measured.json"
    assert main(["card", str(file), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert f"| {MODELS[0]} | both | held out | 1 |" in printed and f"wrote {out}" in printed
    found = read_calibration(out)
    assert found.hardware.name == "h200" and found.models() == MODELS
    assert found.fitted.provenance["measured_on"]["driver"] == "1"
    with pytest.raises(UserError, match="steps of mixtral-8x7b were not measured on h200; known models: deepseek"):
        CardStages(published_spec("mixtral-8x7b"), found)


def beside_rows(beyond):
    """Slow steps, each beside each: for each of its kernels so much of one of the other's is added as `beyond(own kind, other kind)`
    says."""
    shapes = [(0, 0, 1, 64, 512), (0, 0, 1, 256, 512), (1, 1024, 0, 0, 0), (3, 1024, 0, 0, 0)]
    works = [dict(zip(("batch", "context", "chunks", "rows", "past"), shape, strict=True)) for shape in shapes]
    works = [{"model": MODELS[0], "side": "step", **work} for work in works]

    def kind(work):
        return "prompt" if work["chunks"] else "decode"

    def kernels(work):
        return step_kernels(published_spec(MODELS[0]), work["batch"], [work["rows"]] * work["chunks"])

    rows = [{**work, "beside": None, "step_ms": 1e4 * (1 + place)} for place, work in enumerate(works)]
    for (mine, own), (theirs, other) in itertools.product(enumerate(works), enumerate(works)):
        taken = 1 + mine + (1 + theirs) * beyond(kind(own), kind(other)) * kernels(own) / kernels(other)
        rows.append({**own, "beside": other, "step_ms": 1e4 * taken})
    stage = {**works[0], "side": "ffn", "beside": None, "step_ms": 7.0}
    return [*rows, stage, {**stage, "beside": stage}, {"measured": "stages", "error": "no"}]


def test_what_steps_in_flight_cost_each_other_is_measured_by_kind(file, tmp_path, capsys):
    cost = {
        ("decode", "decode"): 0.5,
        ("decode", "prompt"): 1.0,
        ("prompt", "decode"): 0.25,
        ("prompt", "prompt"): 0.75,
    }
    pairs, out = tmp_path / "side_by_side.json", tmp_path / "made-measured.json"
    pairs.write_text(json.dumps({"rows": beside_rows(lambda *kinds: cost[kinds])}))
    assert main(["card", str(file), "--side-by-side", str(pairs), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"\| decode \| prompt \| held out \| 2 \| 1\.\d\d \| 0\.0% \| 0\.0% \| [+-]0\.0% \|", printed)
    assert "a prompt step waits for 0.25 of each kernel of a decode step beside it" in printed
    found = read_calibration(out)
    assert found.fitted.provenance["side_by_side"] == "8 of 16 pairs of side_by_side.json"
    loads = {kind: Load(10.0, 1e6, 1e6, kind=kind) for kind in ("decode", "prompt")}
    for (own, other), lost in cost.items():
        got = slowdowns([loads[own], loads[other]], found.hardware, Contention())
        assert got == pytest.approx([1 + lost, 1 + cost[other, own]])
    three = slowdowns([loads["decode"], loads["decode"], loads["prompt"]], found.hardware, Contention())
    assert three == pytest.approx([2.5, 2.5, 1.5])
    deep = Load(30.0, 1e6, 1e6, kernels=6)  # of 5 s each, where the others have one of 10 s
    unlike = slowdowns([deep, loads["prompt"]], found.hardware, Contention())
    assert unlike == pytest.approx([1 + 1.0 * 2, 1 + 0.25 / 2])
    assert slowdowns([loads["prompt"]] * 2, found.hardware, Contention(interference=0.2)) == pytest.approx([1.2, 1.2])
    streams = Load(
        10.0, 10.0 * found.hardware.memory_bandwidth, 0.0
    )  # four at once take four times as long: it says more
    assert slowdowns([streams] * 2, found.hardware, Contention()) == pytest.approx([2.0] * 2)
    assert slowdowns([streams] * 4, found.hardware, Contention()) == pytest.approx([4.0] * 4)


def test_a_file_without_pairs_is_told(file, tmp_path, capsys):
    pairs = tmp_path / "side_by_side.json"
    pairs.write_text(json.dumps({"rows": [row for row in beside_rows(lambda *_: 0.0) if not row.get("beside")]}))
    assert main(["card", str(file), "--side-by-side", str(pairs)]) == 2
    assert "holds no steps beside each other" in capsys.readouterr().err
    several = [row for row in beside_rows(lambda *_: 0.0) if "error" not in row]
    pairs.write_text(json.dumps({"rows": [row for row in several if not row["beside"] or row["chunks"]]}))
    assert main(["card", str(file), "--side-by-side", str(pairs)]) == 2
    assert "no decode step was measured beside one of decode" in capsys.readouterr().err
    pairs.write_text(json.dumps({"rows": several[4:]}))
    assert main(["card", str(file), "--side-by-side", str(pairs)]) == 2
    assert "is not a result of python -m serving.gpu_suite.side_by_side" in capsys.readouterr().err


def test_measured_steps_are_a_card_to_whoever_simulates(file, tmp_path, monkeypatch):
    assert main(["card", str(file), "--out", str(tmp_path / "toy-measured.json")]) == 0
    monkeypatch.setattr(measured_card, "MEASURED_DIRECTORY", tmp_path)
    (model,) = seeded(MODELS[:1])
    assert hardware_of("toy-measured") == shipped_measured("toy-measured").hardware
    assert isinstance(stages_on("toy-measured", model), CardStages)
    with pytest.raises(UserError, match=r"unknown hardware 'b300'; known: .*h200, .*toy-measured"):
        hardware_of("b300")
    request = Request(0, model.name, (1,) * 300, 3)
    ended = {}
    for card in ("h200", "toy-measured"):
        backend, system = simulate_card(card), registry.create("static", {"max_batch": 4, "prefill_chunk": 256})
        system.start(system.plan(Cluster((Device("gpu0", "cuda", 0, 60 << 30),)), [model], Demand()), backend)
        ended[card] = replay(system, [(0.0, request)], 10.0, backend.clock)[0]
        system.stop()
    stages = stages_on("toy-measured", model)
    prompt_s = stages.prefill_step(256, 0).device_s + stages.prefill_step(44, 256).device_s
    assert ended["toy-measured"][1] == pytest.approx(prompt_s, rel=0.01)
    assert ended["toy-measured"] != ended["h200"]


def test_the_shipped_card_is_made_of_half_of_the_shipped_steps_and_predicts_the_others():
    steps, measured_on = read_steps(Path(__file__).parents[3] / "results" / "h200" / "steps.json")
    shipped, half = shipped_measured("h200-measured"), fitting_half(steps)
    assert shipped.fitted.provenance["measured_on"] == measured_on
    assert shipped.fitted.provenance["steps"].startswith(f"{len(half)} of {len(steps)} steps")
    judged = judge("h200", steps, shipped)
    held_out = [one for one in judged if one.held_out and one.kind != "decode"]
    assert len(held_out) == 15 and all(one.after.median < 0.045 < one.before.median for one in held_out)
    model = held_out[0].model
    fresh = calibrate_card("h200", [step for step in half if step.model == model], {})
    again, kept = (CardStages(published_spec(model), each).mixed_step(2, 600, [(64, 700)]) for each in (fresh, shipped))
    assert again.device_s == pytest.approx(kept.device_s, rel=0.01)


@pytest.mark.parametrize("content", ["{", "[]", '{"rows": [{"model": "m", "control": "fused"}]}', '{"rows": []}'])
def test_a_file_without_steps_is_refused(tmp_path, capsys, content):
    (tmp_path / "steps.json").write_text(content)
    assert main(["card", str(tmp_path / "steps.json")]) == 2
    assert "steps.json" in capsys.readouterr().err
