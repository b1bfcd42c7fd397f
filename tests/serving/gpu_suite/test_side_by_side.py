"""Steps that are timed beside each other are those of two lanes, each as the engine composes it; their rows become tables."""

from types import SimpleNamespace

import pytest
import torch

from serving.gpu_suite import side_by_side
from serving.gpu_suite.side_by_side import LANES, STEPS, STEPS_BY_SIDE, TwoLanes, Work, measure
from serving.gpu_suite.steps import LIMITS, Step
from serving.gpu_suite.steps_table import side_by_side_table
from serving.interface import ServedModel
from serving.memory.kv_pool import KVPool
from serving.spec import load_spec

on_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch sees none")
DECODE, PROMPT, BOTH = Step(2, 33), Step(chunks=1, rows=5, past=19), Step(1, 40, 1, 7, 3)


class Runner:
    """Stands in for the engine's: a step is done once it was looked for as often as it has rows; keeps what it was asked."""

    def __init__(self, models, lanes, limits, control) -> None:
        assert (lanes, limits, control) == (LANES, LIMITS, "lowered")
        self.launched, self.left = [], [0] * lanes

    def launch(self, lane, model, plan) -> None:
        assert not self.left[lane], "the lane is taken"
        self.left[lane] = sum(plan.query_lens)
        fresh = tuple(plan.token_ids)
        self.launched.append(
            (lane, model, plan.query_lens, plan.kv_lens, [one.run.index for one, _ in plan.items], fresh)
        )

    def done(self, lane) -> bool:
        self.left[lane] = max(self.left[lane] - 1, 0)
        return not self.left[lane]

    def result(self, lane) -> None:
        assert not self.left[lane]

    def close(self) -> None:
        assert not any(self.left), "a step is under way"


@pytest.fixture
def lanes(tiny_checkpoints, monkeypatch):
    specs = [load_spec(tiny_checkpoints[name]) for name in ("qwen3_moe", "deepseek_v2")]
    pool = KVPool(400, 1 << 16, [(spec, "float32") for spec in specs], max_runs=LANES * LIMITS.max_batch)
    monkeypatch.setattr(side_by_side, "StepRunner", Runner)
    models = [SimpleNamespace(kv=pool.models[spec.name], attention=SimpleNamespace(spec=spec)) for spec in specs]
    lanes = TwoLanes(models, "lowered", [DECODE, PROMPT, BOTH])
    yield lanes
    lanes.close()
    for model in models:
        model.kv.layers.clear()
    pool.close()


@pytest.mark.cpu
def test_each_step_is_timed_beside_each_in_lanes_of_their_own(lanes):
    works = [Work(0, DECODE), Work(0, PROMPT), Work(1, BOTH)]
    rows = list(measure(works, ["qwen", "deepseek"], lanes.whole, 2))
    assert sum(row["beside"] is None for row in rows) == 3 and len(rows) == 3 + 9
    pairs = {
        tuple((one["model"], one["batch"], one["rows"]) for one in (row, row["beside"]))
        for row in rows
        if row["beside"]
    }
    each = [("qwen", 2, 0), ("qwen", 0, 5), ("deepseek", 1, 7)]
    assert pairs == {(one, other) for one in each for other in each}
    assert all(row["most_ms"] >= row["step_ms"] >= row["least_ms"] > 0 and row["repeats"] >= 2 for row in rows)
    asked = lanes._runner.launched
    assert {launch[:4] for launch in asked} == {
        (lane, *step)
        for lane in range(LANES)
        for step in ((0, (1, 1), (33, 33)), (0, (5,), (24,)), (1, (1, 7), (40, 10)))
    }
    runs = [{(model, run) for at, model, *_, held, _ in asked if at == lane for run in held} for lane in range(LANES)]
    assert not runs[0] & runs[1]


@pytest.mark.cpu
def test_of_two_that_differ_in_length_the_shorter_goes_on(lanes):
    short, long = side_by_side.repeated_ms([lanes.whole(0, Work(0, DECODE)), lanes.whole(1, Work(1, BOTH))], 4)
    assert len(short) > len(long) >= 4
    asked = [fresh for *_, fresh in lanes._runner.launched]
    assert len(set(asked)) == len(asked)  # new tokens each time


@pytest.mark.cpu
def test_what_does_not_end_is_told(lanes, monkeypatch):
    monkeypatch.setattr(side_by_side, "_LIMIT_S", 0.01)
    monkeypatch.setattr(Runner, "done", lambda runner, lane: False)
    with pytest.raises(RuntimeError, match="unfinished"):
        side_by_side.repeated_ms([lanes.whole(0, Work(0, DECODE))], 1)
    lanes._runner.left = [0] * LANES


@pytest.mark.cpu
def test_what_is_measured_has_a_graph_and_room_in_both_lanes():
    assert set(STEPS_BY_SIDE) <= set(STEPS)
    for step in STEPS:
        assert step.chunks <= 1 and step.sequences <= LIMITS.max_batch and step.rows <= LIMITS.prefill_chunk


@pytest.mark.cpu
def test_the_table_shows_how_many_times_as_long():
    def named(rows, side="step"):
        return {"model": "m", "side": side, "batch": 0, "context": 0, "chunks": 1, "rows": rows, "past": 0}

    one, other = named(64), named(9)
    rows = [{**one, "beside": None, "step_ms": 4.0}, {**other, "beside": None, "step_ms": 2.0}]
    rows += [{**one, "beside": other, "step_ms": 5.0}, {**other, "beside": one, "step_ms": 4.0}]
    stage = named(9, "ffn")
    rows += [{**stage, "beside": None, "step_ms": 1.0}, {**stage, "beside": stage, "step_ms": 1.5}]
    steps, stages = side_by_side_table(rows).split("\n\n")
    assert steps.splitlines()[2:] == ["| m prompt 64 | 4.00 | 1.25 |  |", "| m prompt 9 | 2.00 |  | 2.00 |"]
    assert stages.splitlines()[2:] == ["| m ffn prompt 9 | 1.00 | 1.50 |"]


@pytest.mark.cpu
@pytest.mark.skipif(torch.cuda.is_available(), reason="a card is there")
def test_a_machine_without_a_card_is_told(tmp_path, capsys):
    assert side_by_side.main(["--out", str(tmp_path / "side_by_side.json")]) == 2
    assert "serving.doctor" in capsys.readouterr().err


@pytest.mark.gpu
@on_card
@torch.inference_mode()
def test_steps_and_sides_run_beside_each_other_on_a_card(tiny_checkpoints):
    models = [
        ServedModel(load_spec(tiny_checkpoints[name]), tiny_checkpoints[name], "bfloat16", True)
        for name in ("qwen3_moe", "deepseek_v2")
    ]
    held, pool = side_by_side.load(models, 8 << 30, kv_bytes=1 << 30)
    lanes = TwoLanes(held, "lowered", [DECODE, BOTH])
    names = [model.name for model in models]
    rows = list(measure([Work(0, DECODE), Work(1, BOTH)], names, lanes.whole, 2))
    rows += measure([Work(0, DECODE, "attention"), Work(1, BOTH, "ffn")], names, lanes.side, 2)
    assert len(rows) == 12 and all(row["step_ms"] > 0 for row in rows)
    lanes.close()
    del lanes, held
    pool.close()
