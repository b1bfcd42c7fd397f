"""Groups on the simulated backend: every request ends, runs repeat, and a cut pays where the model says it does."""

import pytest

from runner.observation import COMPLETED
from runner.replay import Replay
from serving import registry
from serving.cost.hardware import load_hardware
from serving.cost.operators import CostModel
from serving.cost.roofline import RooflineStages, SharedStages
from serving.cost.stages import StageCosts
from serving.generate import cpu_cluster
from serving.interface import Demand, ServedModel
from serving.parallel.costs import GroupCosts, StepShape
from serving.parallel.group import GroupPlan
from serving.sim.backend import simulate_card
from serving.spec import load_spec
from workloads.trace import TraceRequest

pytestmark = pytest.mark.cpu

CUTS = {
    "tp2": {"mixtral": {"devices": [0, 1]}, "deepseek_v2": {"devices": [2, 3]}},
    "co-located": {"mixtral": {"devices": [0, 1, 2, 3]}, "deepseek_v2": {"devices": [2, 3]}},
    "replicated": {"mixtral": [{"devices": [0]}, {"devices": [1]}], "deepseek_v2": {"devices": [2, 3]}},
}


def simulate(groups, checkpoints, count=24, gap_s=0.0005):
    names = ("mixtral", "deepseek_v2")
    models = [ServedModel(load_spec(checkpoints[name], name), checkpoints[name], "bfloat16") for name in names]
    trace = [TraceRequest(i, names[i % 2], i * gap_s, 9 + i, 6, (1,) * (9 + i)) for i in range(count)]
    backend = simulate_card("h200")
    system = registry.create("static", {"page_bytes": 4096, "placement": "given", "groups": groups})
    system.start(system.plan(cpu_cluster(4, 64 << 20), models, Demand()), backend)
    try:
        return Replay(system, trace, 10.0, 0.0005, backend.clock).run(len(trace), "sim")
    finally:
        system.stop()


@pytest.mark.parametrize("cut", CUTS)
def test_every_request_completes_and_runs_repeat_bit_for_bit(cut, tiny_checkpoints):
    first, second = (simulate(CUTS[cut], tiny_checkpoints) for _ in range(2))
    assert {row.outcome for row in first.requests} == {COMPLETED}
    assert [row.token_times_ns for row in first.requests] == [row.token_times_ns for row in second.requests]
    last = {row.pool: row.pages_in_use for row in first.pools}
    assert len(last) >= 4 and not any(last.values())


def test_a_group_alone_takes_one_step_of_its_costs_a_token(tiny_checkpoints):
    groups = {"mixtral": {"devices": [0, 1]}, "deepseek_v2": {"devices": [2, 3]}}
    row = simulate(groups, tiny_checkpoints, count=1).requests[0]
    spec = load_spec(tiny_checkpoints["mixtral"], "mixtral")
    costs = GroupCosts(StageCosts(spec, CostModel(load_hardware("h200"))), GroupPlan(("a", "b"), tp=2))
    gaps_s = [(b - a) / 1e9 for a, b in zip(row.token_times_ns, row.token_times_ns[1:], strict=False)]
    assert gaps_s == pytest.approx([costs.step_s([StepShape(1, 9 + n)]) for n in range(1, 6)], rel=1e-3)


@pytest.mark.parametrize("kind", [RooflineStages, SharedStages])
def test_shares_take_less_than_the_whole_and_more_than_their_part(kind, tiny_checkpoints):
    """Exchanges and what is not cut (the router, latents, norms) cost extra."""
    hardware = load_hardware("cpu2")
    for name in tiny_checkpoints:
        spec = load_spec(tiny_checkpoints[name], name)
        whole = RooflineStages(spec, "float32", hardware)
        share = RooflineStages(spec, "float32", hardware, 2) if kind is RooflineStages else SharedStages(whole, 2)
        for stage in (lambda s: s.ffn(2, 4), lambda s: s.head(4)):
            assert whole.launched_s(stage(whole)) / 2 <= share.launched_s(stage(share)) * 1.01
        heads = spec.attention.num_heads
        if heads % 2 == 0:
            assert share.attention(4, 400).work.bytes < whole.attention(4, 400).work.bytes


def test_data_parallel_replicas_wait_for_the_slowest(tiny_checkpoints):
    spec = load_spec(tiny_checkpoints["deepseek_v2"], "deepseek_v2")
    costs = GroupCosts(StageCosts(spec, CostModel(load_hardware("h200"))), GroupPlan(("a", "b"), dp=2))
    short, long = StepShape(1, 50), StepShape(4, 2000, ((32, 0),))
    assert costs.step_s([short, long]) == costs.step_s([long, short]) > costs.step_s([short, short])
    assert costs.step_s([short, StepShape()]) > 0
