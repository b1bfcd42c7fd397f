"""Steps of one rank without its peers are of the shapes and rows that it would have beside them."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from serving.checkpoints import open_checkpoint
from serving.cuda.groups.parts import GroupParts
from serving.cuda.groups.rank import CardRank
from serving.cuda.layers import CardAttentionHalf, CardFFNHalf
from serving.cuda.layout import BLOCK_TOKENS, CardLayout
from serving.errors import UserError
from serving.gpu_suite import group_steps, steps
from serving.gpu_suite.group_steps import GroupStep, steps_to_measure
from serving.gpu_suite.rank_alone import RankAlone
from serving.gpu_suite.steps_table import group_steps_table
from serving.interface import ServedModel
from serving.memory.kv_pool import KVPool
from serving.parallel.group import GroupPlan
from serving.parallel.share import ShareOfWeights, share_spec
from serving.part_shapes import shapes_of
from serving.spec import load_spec

on_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch sees none")
CPU = torch.device("cpu")


class SeenRows:
    """An FFN half that remembers what it was given, by layer."""

    def __init__(self, half) -> None:
        self._half, self.given = half, {}

    def forward(self, layer, rows):
        self.given[layer] = rows.clone()
        return self._half.forward(layer, rows)


def rank_of(directory, tp, dp):
    """Rank 0 of a tiny checkpoint's group on the CPU, with its pool; pages where idle rows are read and written are there."""
    spec, plan = load_spec(directory), GroupPlan(tuple(map(str, range(tp * dp))), tp, dp)
    share = plan.share(0)
    own = share_spec(spec, share)
    with ShareOfWeights(open_checkpoint(directory, spec.name), share) as weights:
        halves = (CardAttentionHalf(own, weights, torch.float32, CPU), CardFFNHalf(own, weights, torch.float32, CPU))
    pool = KVPool(800, 1 << 14, [(own, "float32")], max_runs=6)
    kv = pool.models[spec.name]
    idle = kv.open_run()
    kv.grow(idle, 1)
    blocks = torch.arange(-(-kv.geometry.max_context_tokens // BLOCK_TOKENS))
    return plan, CardRank(halves[0], SeenRows(halves[1]), kv, blocks, tp, 0), pool


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("architecture", "tp", "dp"), [("qwen3_moe", 2, 1), ("deepseek_v2", 1, 2), ("qwen3_moe", 2, 2)]
)
@pytest.mark.parametrize(
    "step",
    [
        GroupStep(steps.Step(3, 33)),
        GroupStep(steps.Step(chunks=1, rows=11, past=19), 2),
        GroupStep(steps.Step(2, 9, 1, 7), 2),
    ],
)
@torch.inference_mode()
def test_a_rank_computes_its_share_of_the_rows_of_all_who_are_active(architecture, tp, dp, step, tiny_checkpoints):
    plan, held, pool = rank_of(tiny_checkpoints[architecture], tp, dp)
    step = dataclasses.replace(step, active=min(step.active, dp))
    shapes = shapes_of(steps.LIMITS, held.kv.geometry.max_context_tokens, dp)
    runs = steps.filled_runs(held.kv, step.step.sequences, step.step.longest)
    (part,) = GroupParts(dp, shapes, steps.LIMITS, pinned=False).of(step.plans(runs, dp))
    rank, layers = RankAlone(plan, held, max(shape.rows for shape in shapes)), held.attention.spec.num_layers
    layout = CardLayout.of(part.shape, part.numbers[0], held.blocks)
    slots = layout.slots.where(layout.slots >= 0, 0)  # CPU forms know no idle rows
    layout = dataclasses.replace(layout, slots=slots, kv_lens=layout.kv_lens.clamp(min=1))
    tokens = rank.whole(layout, part.sources)
    assert len(tokens) == part.shape.sequences >= len(part.wanted[0]) > 0 and sorted(held.ffn.given) == list(
        range(layers)
    )
    given = held.ffn.given[layers - 1]
    assert len(given) == dp * part.shape.rows
    if dp > 1:
        assert len(given.unique(dim=0)) == step.active * (step.step.batch + step.step.rows)
    held.ffn.given.clear()
    assert rank.attention(layout).shape == tokens.shape and not held.ffn.given
    rank.ffn(part.shape.rows, part.sources, [0])
    assert list(held.ffn.given) == [0] and held.ffn.given[0].shape == given.shape
    held.kv.layers.clear()
    pool.close()


@pytest.mark.cpu
@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_every_graph_is_measured_with_one_replica_and_with_all(replicas):
    measured = steps_to_measure(replicas)
    assert {step.active for step in measured} == {1, replicas}
    for shape in shapes_of(steps.LIMITS, 1 << 20):
        if not (shape.decode and shape.chunk):
            found = {step.active for step in measured if (step.step.batch, step.step.rows) == shape}
            assert found == {1, replicas}, shape
    assert all(step.step.chunks <= 1 for step in measured)


@pytest.mark.cpu
def test_replicas_that_are_not_active_have_no_plan():
    run = SimpleNamespace(start_slot=0)
    plans = GroupStep(steps.Step(2, 9), 2).plans([run, run], 3)
    assert [plan and plan.query_lens for plan in plans] == [(1, 1), (1, 1), None]


@pytest.mark.cpu
def test_groups_are_cut_as_systems_cut_them():
    (qwen, cut), (glm, replicated) = group_steps.read_groups("qwen3-30b-a3b:2,glm-4.7-flash:4")
    assert (qwen.name, cut.tp, cut.dp) == ("qwen3-30b-a3b", 2, 1)
    assert (glm.name, replicated.tp, replicated.dp) == ("glm-4.7-flash", 1, 4)
    assert len(group_steps.read_groups(group_steps.GROUPS)) == 3
    for text in ("qwen3-30b-a3b", "qwen3-30b-a3b:1", "qwen3-30b-a3b:two", "", "gpt-5:2", "qwen3-30b-a3b:5"):
        with pytest.raises(UserError):
            group_steps.read_groups(text)


@pytest.mark.cpu
@pytest.mark.skipif(torch.cuda.is_available(), reason="a card is there")
def test_a_machine_without_a_card_is_told(tmp_path, capsys):
    assert group_steps.main(["--out", str(tmp_path / "group_steps.json")]) == 2
    assert "serving.doctor" in capsys.readouterr().err


@pytest.mark.cpu
def test_the_table_shows_a_line_a_step():
    row = {"model": "m", "tp": 1, "dp": 2, "active": 2, "batch": 3, "context": 99, "rows": 0, "past": 0}
    row |= {"step_ms": 5.0, "launch_ms": 0.1, "attention_ms": 2.0, "ffn_ms": 2.5}
    assert group_steps_table([row]).splitlines()[2] == "| m | 1 x 2 | 2 | 3 | 99 | 0 | 0 | 5.00 | 0.10 | 2.00 | 2.50 |"


@pytest.mark.gpu
@on_card
@pytest.mark.parametrize(("architecture", "tp", "dp"), [("qwen3_moe", 2, 1), ("deepseek_v2", 1, 2)])
@torch.inference_mode()
def test_a_rank_is_timed_on_a_card(architecture, tp, dp, tiny_checkpoints, monkeypatch):
    directory = tiny_checkpoints[architecture]
    model, plan = (
        ServedModel(load_spec(directory), directory, "bfloat16", True),
        GroupPlan(tuple("abcd"[: tp * dp]), tp, dp),
    )
    wanted = [GroupStep(steps.Step(3, 33), dp), GroupStep(steps.Step(2, 9, 1, 27, 19))]
    monkeypatch.setattr(group_steps, "_KV_BYTES", 1 << 29)
    monkeypatch.setattr(group_steps, "steps_to_measure", lambda replicas: wanted)
    rows = group_steps.load_and_measure(model, plan, 4 << 30, 2)
    assert [(row["batch"], row["rows"], row["active"]) for row in rows] == [(3, 0, dp), (2, 27, 1)]
    for row in rows:
        assert row["step_ms"] > row["launch_ms"] > 0 and row["attention_ms"] > 0
        assert row["ffn_ms"] > row["dense_ms"] >= 0
