"""Groups on a card by measured steps of one rank: made-up steps come back, with exchanges and the start of other ranks added."""

from __future__ import annotations

import dataclasses
import json

import pytest

from serving import registry
from serving.cost import measured_card
from serving.cost.__main__ import main
from serving.cost.cards import stages_on
from serving.cost.measured_card import graph_rows
from serving.cost.table1 import published_spec
from serving.errors import UserError
from serving.gpu_suite.seeded import seeded
from serving.gpu_suite.serve import replay
from serving.interface import Cluster, Demand, Device, Request
from serving.parallel.costs import GroupCosts, StepShape
from serving.parallel.group import GroupPlan
from serving.parallel.group_steps import calibrate_ranks, fitting_steps, judge, read_exchanges, read_rank_steps
from serving.parallel.measured_costs import Pass, RankStages, group_costs, passes_of
from serving.sim.backend import simulate_card

pytestmark = pytest.mark.cpu

CUT, REPLICATED = ("qwen3-30b-a3b", 2, 1), ("deepseek-v2-lite", 1, 2)
LAUNCH_MS = 0.05
EXCHANGE_US = {1: 7.0, 4: 7.0, 256: 20.0}  # rows of 4 KiB between two cards


def sides_ms(model, tp, dp, active, batch=0, context=0, rows=0, past=0):
    """What a made-up rank takes: microseconds of a layer that grow with rows, tokens and experts."""
    spec = published_spec(model)
    padded = (graph_rows(rows, True) if rows else 0) + (graph_rows(batch, False) if batch else 0)
    gathered, differing = dp * padded, active * (batch + rows) if dp > 1 else padded
    attention_us = 40 + 0.2 * padded + 0.002 * padded * past + 0.0005 * batch * context
    routed_us = 20 + 0.1 * gathered + 3 * spec.moe.distinct_experts(differing)
    dense = len(spec.dense_layers)
    dense_ms = dense * (30 + 0.5 * gathered) / 1e3
    return {
        "attention_ms": spec.num_layers * attention_us / 1e3,
        "ffn_ms": (spec.num_layers - dense) * routed_us / 1e3 + dense_ms,
        "dense_ms": dense_ms,
    }


def made_row(group, active=1, batch=0, context=0, rows=0, past=0):
    model, tp, dp = group
    sides = sides_ms(*group, active, batch, context, rows, past)
    step = {"batch": batch, "context": context, "chunks": int(rows > 0), "rows": rows, "past": past}
    took = {"step_ms": sides["attention_ms"] + sides["ffn_ms"] + 0.1, "launch_ms": LAUNCH_MS}
    return {"model": model, "tp": tp, "dp": dp, "active": active, **step, **took, **sides}


@pytest.fixture
def files(tmp_path):
    rows = []
    for group, actives in ((CUT, (1,)), (REPLICATED, (1, 2))):
        for active in actives:
            rows += [made_row(group, active, batch, context) for batch in (1, 2, 3, 4) for context in (128, 1024, 8192)]
            rows += [made_row(group, active, 0, 0, n, past) for n in (16, 32, 64, 128, 256) for past in (0, 512, 2048)]
        rows += [made_row(group, 1, batch, 1024, 256, 512) for batch in (1, 3)]
    rows.append({"model": "x", "tp": 2, "dp": 1, "error": "no"})
    steps, exchanges = tmp_path / "group_steps.json", tmp_path / "memory.json"
    steps.write_text(json.dumps({"hardware": ["made up"], "rows": rows}))
    told = {f"sum over 2 cards, {count} rows": us for count, us in EXCHANGE_US.items()}
    content = {"hardware": ["made up"] * 2, "rows": {"exchange_us": {**told, "one card asks 1, 1 rows": 99.0}}}
    exchanges.write_text(json.dumps(content))
    return steps, exchanges


@pytest.fixture
def found(files):
    steps, exchanges = read_rank_steps(files[0])[0], read_exchanges(files[1])[0]
    return calibrate_ranks("h200", steps, exchanges, {})


def plan_of(group):
    return GroupPlan(tuple("ab"[: group[1] * group[2]]), *group[1:])


def test_steps_held_out_are_predicted(files, found):
    steps, measured_on = read_rank_steps(files[0])
    assert len(steps) == 3 * 27 + 4 and measured_on == {"hardware": ["made up"]}
    half = fitting_steps(steps)
    assert 0.4 < len(half) / len(steps) < 0.6
    judged = judge(steps, calibrate_ranks("h200", half, read_exchanges(files[1])[0], {}))
    assert sum(one.after.rows for one in judged) == len(steps)
    assert all(one.after.median < 0.03 for one in judged), judged
    assert {one.kind for one in judged if one.held_out} == {"decode", "prompt", "both"}


def test_passes_are_of_the_shape_that_the_largest_replica_needs():
    some = StepShape(2, 99, ((100, 0), (7, 5)))
    assert passes_of([some]) == (Pass(2 + 128, 2 + 128), Pass(16, 16))
    assert passes_of([some, StepShape(5, 50)]) == (Pass(2 * (5 + 128), 2 + 100 + 5), Pass(2 * 16, 7))
    assert passes_of([StepShape(), StepShape(1, 50)]) == (Pass(2, 1),)


@pytest.mark.parametrize("group", [CUT, REPLICATED], ids=lambda group: f"tp{group[1]}-dp{group[2]}")
def test_a_step_takes_a_rank_its_share_and_all_the_exchanges_of_a_layer(group, found):
    spec, plan = published_spec(group[0]), plan_of(group)
    stages = measured_card.CardStages(spec, measured_card.shipped_measured("h200-measured"), found)
    costs, own = group_costs(stages, plan), StepShape(3, 3 * 1024)
    step_s = costs.step_s([own] * plan.dp)
    row = made_row(group, plan.dp, 3, 1024)
    per_layer = 2  # a sum over heads or the rows of all replicas, and the sum over widths
    once = 3 if group == CUT else 0  # embedding, and the best of each part of the vocabulary
    exchanged_ms = (per_layer * spec.num_layers) * EXCHANGE_US[4] / 1e3
    least_ms = row["step_ms"] + exchanged_ms + LAUNCH_MS
    assert least_ms * 0.99 < step_s * 1e3 < (least_ms + once * EXCHANGE_US[4] / 1e3) * 1.01
    apart = costs.step_s([StepShape(0, 0, ((256, 512),))] + [StepShape()] * (plan.dp - 1))
    both = costs.step_s([StepShape(3, 3072, ((256, 512),))] + [StepShape()] * (plan.dp - 1))
    assert apart < both < 0.9 * (apart + step_s)
    load = costs.step_load([own] * plan.dp)
    assert load.alone_s == step_s and 0 < load.bytes < group_costs(stages, GroupPlan(("a",))).step_load([own]).bytes


def test_groups_that_were_not_measured_are_refused(found):
    stages = measured_card.CardStages(published_spec(CUT[0]), measured_card.shipped_measured("h200-measured"), found)
    with pytest.raises(
        UserError, match=r"qwen3-30b-a3b over tp4 x dp1 were not measured on h200 \(measured: .*tp2xdp1"
    ):
        group_costs(stages, GroupPlan(tuple("abcd"), 4, 1))
    rows = {**found.rows, "collective": found.rows["collective"].select(found.rows["collective"].variant == "none")}
    with pytest.raises(UserError, match="exchanges between 2 cards were not measured"):
        RankStages(published_spec(CUT[0]), plan_of(CUT), dataclasses.replace(found, rows=rows))
    alone = measured_card.CardStages(published_spec(CUT[0]), measured_card.shipped_measured("h200-measured"))
    with pytest.raises(UserError, match="measured whole, and it lies on 2 devices"):
        group_costs(alone, plan_of(CUT))
    assert isinstance(group_costs(alone, GroupPlan(("a",))), GroupCosts)


def test_the_command_writes_what_simulated_groups_are_served_with(files, tmp_path, capsys, monkeypatch):
    shipped = (measured_card.MEASURED_DIRECTORY / "h200-measured.json").read_text()
    (tmp_path / "toy-measured.json").write_text(shipped)
    out = tmp_path / "toy-measured.groups.json"
    assert main(["groups", str(files[0]), "--exchanges", str(files[1]), "--out", str(out)]) == 0
    assert "| deepseek-v2-lite/tp1xdp2 | both | held out | 1 |" in capsys.readouterr().out
    monkeypatch.setattr(measured_card, "MEASURED_DIRECTORY", tmp_path)
    assert measured_card.known_measured() == ("toy-measured",)
    (model,) = seeded([REPLICATED[0]])
    cluster = Cluster(tuple(Device(f"gpu{i}", "cuda", i, 60 << 30) for i in range(2)))
    options = {"placement": "given", "groups": {model.name: {"devices": [0, 1]}}, "max_batch": 4, "prefill_chunk": 256}
    backend, system = simulate_card("toy-measured"), registry.create("static", options)
    system.start(system.plan(cluster, [model], Demand()), backend)
    times = replay(system, [(0.0, Request(0, model.name, (1,) * 300, 3))], 10.0, backend.clock)[0]
    system.stop()
    costs = group_costs(stages_on("toy-measured", model), plan_of(REPLICATED))
    chunks_s = [costs.step_s([StepShape(0, 0, (chunk,)), StepShape()]) for chunk in ((256, 0), (44, 256))]
    decode_s = costs.step_s([StepShape(1, 301), StepShape()])
    assert times[1] == pytest.approx(sum(chunks_s), rel=0.01)
    assert times[2] - times[1] == pytest.approx(decode_s, rel=0.02)


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"rows": []}', '{"rows": [{"model": "m"}]}', '{"rows": {"exchange_us": {}}}']
)
def test_files_that_are_no_results_are_refused(tmp_path, content):
    (tmp_path / "made.json").write_text(content)
    for read in (read_rank_steps, read_exchanges):
        with pytest.raises(UserError, match=r"made\.json"):
            read(tmp_path / "made.json")
