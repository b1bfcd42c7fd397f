"""Steps that are measured on a card are those that the engine composes; their rows become tables."""

from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from serving.gpu_suite import steps
from serving.gpu_suite.engine import load
from serving.gpu_suite.steps_table import steps_table
from serving.interface import ServedModel
from serving.memory.kv_pool import KVPool
from serving.part_shapes import shapes_of
from serving.spec import load_spec

on_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch sees none")


class Recorder:
    """Stands in for the runner: keeps what it was asked to compute."""

    launched: ClassVar[list] = []

    def __init__(self, models, lanes, limits, control) -> None:
        Recorder.launched = []

    def launch(self, lane, model, plan) -> None:
        fresh = tuple(tuple(sequence.tokens[start:]) for sequence, start in zip(*zip(*plan.items), strict=False))
        Recorder.launched.append((plan.query_lens, plan.kv_lens, plan.logit_rows, fresh))

    def done(self, lane) -> bool:
        return True

    def result(self, lane) -> None:
        pass

    def close(self) -> None:
        pass


@pytest.fixture
def tiny(tiny_checkpoints):
    spec = load_spec(tiny_checkpoints["qwen3_moe"])
    pool = KVPool(400, 1 << 16, [(spec, "float32")], max_runs=4)
    kv = pool.models[spec.name]
    yield SimpleNamespace(kv=kv, attention=SimpleNamespace(spec=spec))
    kv.layers.clear()
    pool.close()


@pytest.mark.cpu
def test_steps_are_composed_as_they_say(tiny, monkeypatch):
    monkeypatch.setattr(steps, "StepRunner", Recorder)
    idle = SimpleNamespace(attention_s=lambda numbers: 0.25, ffn_s=lambda: 0.5, dense_s=lambda: 0.0)
    monkeypatch.setattr(steps, "Sides", lambda model, shape: idle)
    both = steps.Step(2, 33, 1, 5, 19)
    wanted = [steps.Step(chunks=1, rows=5, past=19), steps.Step(2, 33), both, steps.Step(1, 40, 2, 7, 3)]
    longer = steps.Step(1, tiny.kv.geometry.max_context_tokens + 1)
    rows = list(steps.measure("tiny", tiny, "fused", [*wanted, longer], 2))
    asked = [Recorder.launched[index][:3] for index in (0, 5, 10, 15)]  # three of each do not count
    assert asked[:2] == [((5,), (24,), (4,)), ((1, 1), (33, 33), (0, 1))]
    assert asked[2:] == [((1, 1, 5), (33, 33, 24), (0, 1, 6)), ((1, 7, 7), (40, 10, 10), (0, 7, 14))]
    assert len({fresh for *_, fresh in Recorder.launched}) == len(Recorder.launched)
    assert [row["batch"] for row in rows] == [0, 2, 2, 1] and all(row["most_ms"] >= row["step_ms"] > 0 for row in rows)
    assert [row.get("attention_ms") for row in rows] == [250.0, 250.0, 250.0, None]


@pytest.mark.cpu
def test_every_graph_is_measured_and_a_size_between():
    measured = steps.steps_to_measure()
    for shape in shapes_of(steps.LIMITS, 1 << 20):
        assert any((step.batch, step.rows, step.chunks) == (*shape, bool(shape.chunk)) for step in measured), shape
    assert any(step.rows & (step.rows - 1) for step in measured)
    assert all(step.sequences <= steps.LIMITS.max_batch for step in measured)
    assert all(step.chunks * step.rows <= steps.LIMITS.prefill_chunk for step in measured)


@pytest.mark.cpu
def test_tables_show_steps_and_what_their_parts_take_alone():
    alone = {"model": "m", "control": "fused", "batch": 0, "context": 0, "chunks": 0, "rows": 0, "past": 0}
    rows = [
        {**alone, "chunks": 1, "rows": 100, "step_ms": 10.0, "attention_ms": 3.0, "ffn_ms": 6.5},
        {**alone, "chunks": 1, "rows": 100, "past": 512, "step_ms": 11.0},
        {**alone, "batch": 3, "context": 128, "step_ms": 5.0},
        {**alone, "batch": 3, "context": 128, "chunks": 2, "rows": 100, "step_ms": 24.0},
        {**alone, "batch": 2, "context": 99, "chunks": 1, "rows": 7, "step_ms": 2.0},
    ]
    prompts, decodes, parted = steps_table(rows).split("\n\n")
    assert prompts.splitlines()[2:] == ["| m | fused | 100 | 10.00 | 11.00 | 3.00 | 6.50 |"]
    assert decodes.splitlines()[2:] == ["| m | fused | 3 | 5.00 |  |  |"]
    assert parted.splitlines()[2:] == [
        "| m | fused | 3 | 128 | 2 | 100 | 0 | 24.00 | 0.96 |",
        "| m | fused | 2 | 99 | 1 | 7 | 0 | 2.00 |  |",
    ]


@pytest.mark.cpu
@pytest.mark.skipif(torch.cuda.is_available(), reason="a card is there")
def test_a_machine_without_a_card_is_told(tmp_path, capsys):
    assert steps.main(["--out", str(tmp_path / "steps.json")]) == 2
    assert "serving.doctor" in capsys.readouterr().err
    assert steps.main(["--out", str(tmp_path / "steps.json"), "--models", "gpt-5"]) == 2
    assert "known: " in capsys.readouterr().err


@pytest.mark.gpu
@on_card
@pytest.mark.parametrize("architecture", ["qwen3_moe", "deepseek_v2"])
@pytest.mark.parametrize("control", ["fused", "lowered"])
@torch.inference_mode()
def test_steps_run_on_a_card(architecture, control, tiny_checkpoints):
    model = ServedModel(load_spec(tiny_checkpoints[architecture]), tiny_checkpoints[architecture], "bfloat16", True)
    together, _, pool = load(model, 4 << 30, kv_bytes=1 << 29)
    both = steps.Step(3, 33, 1, 27, 19)
    wanted = [steps.Step(chunks=1, rows=27, past=19), steps.Step(3, 33), both, steps.Step(1, 40, 2, 7, 3)]
    rows = list(steps.measure(model.name, together, control, wanted, 2))
    assert len(rows) == len(wanted) and all(row["step_ms"] > 0 for row in rows)
    for row in rows[:3]:
        assert row["attention_ms"] > 0 and row["ffn_ms"] > row["dense_ms"] >= 0
    assert "ffn_ms" not in rows[3]
    del together
    pool.close()
