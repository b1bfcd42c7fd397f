"""Timelines: idle time is attributed as worked out by hand, and a real run leaves one that adds up."""

import json

import numpy as np
import pytest

from serving import registry
from serving.errors import UserError
from serving.generate import cpu_cluster, generate
from serving.interface import Demand, Request, ServedModel
from serving.spec import load_spec
from serving.timeline import ATTENTION, FFN, FINISH, attribute_idle, chrome_trace, read_timeline
from serving.workers.timeline import A2F, F2A, SPAN

pytestmark = pytest.mark.cpu


def spans(*rows):
    return np.array([(start, end, stage, lane, 0, 0, 1) for start, end, stage, lane in rows], dtype=SPAN)


def test_idle_time_is_attributed_by_cause():
    attention = spans((0, 10, ATTENTION, 0), (30, 40, ATTENTION, 0), (60, 70, FINISH, 0), (90, 100, ATTENTION, 0))
    ffn = spans((12, 28, FFN, 0), (42, 58, FFN, 0))
    shares = attribute_idle(attention, ffn)
    assert shares["attention"] == pytest.approx(
        {"busy": 0.40, "transfer": 0, "waiting for FFN": 0.32, "hand-over": 0.08, "no work": 0.20}
    )
    assert shares["ffn"] == pytest.approx(
        {"busy": 0.32, "transfer": 0, "waiting for attention": 0.40, "hand-over": 0.08, "no work": 0.20}
    )


def test_transfers_that_are_stages_of_their_own_are_told_from_control():
    """Attention 0-10, its rows leave until 14, are found at 16, computed until 30, come back until 34, found at 36."""
    attention = spans((0, 10, ATTENTION, 0), (10, 14, A2F, 0), (36, 50, FINISH, 0))
    ffn = spans((16, 30, FFN, 0), (30, 34, F2A, 0))
    shares = attribute_idle(attention, ffn)
    assert shares["attention"] == pytest.approx(
        {"busy": 0.48, "transfer": 0.16, "waiting for FFN": 0.28, "hand-over": 0.08, "no work": 0}
    )
    assert shares["ffn"] == pytest.approx(
        {"busy": 0.28, "transfer": 0.16, "waiting for attention": 0.48, "hand-over": 0.08, "no work": 0}
    )


def test_two_lanes_overlap_and_an_empty_side_is_refused():
    attention = spans((0, 10, ATTENTION, 0), (10, 20, ATTENTION, 1), (20, 30, FINISH, 0), (30, 40, FINISH, 1))
    ffn = spans((10, 20, FFN, 0), (20, 30, FFN, 1))
    shares = attribute_idle(attention, ffn)
    assert shares["attention"]["busy"] == 1.0 and shares["ffn"]["busy"] == 0.5
    with pytest.raises(UserError, match="is empty"):
        attribute_idle(attention, ffn[:0])


@pytest.mark.parametrize("control", ["lowered", "host"])
def test_a_run_leaves_a_timeline_that_adds_up(control, tiny_checkpoints, tmp_path):
    model = ServedModel(load_spec(tiny_checkpoints["mixtral"], "m"), tiny_checkpoints["mixtral"])
    options = {"page_bytes": 4096, "control": control, "timeline_dir": str(tmp_path)}
    system = registry.create("crosspool", options)
    try:
        system.start(system.plan(cpu_cluster(2, 64 << 20), [model], Demand()))
        generate(system, [Request(i, "m", (1, 2, 3), 10) for i in range(2)])
    finally:
        system.stop()
    timelines = read_timeline(tmp_path)
    attention, ffn = timelines["cpu-0"], timelines["cpu-1"]
    steps = (attention["stage"] == FINISH).sum()
    crossings = steps * model.spec.num_layers
    counts = [(side["stage"] == stage).sum() for side in (attention, ffn) for stage in (ATTENTION, A2F, FFN, F2A)]
    assert counts == [crossings, crossings, 0, 0, 0, 0, crossings, crossings]
    assert (attention["end_ns"] >= attention["start_ns"]).all()
    for side in attribute_idle(attention, ffn).values():
        assert sum(side.values()) == pytest.approx(1.0)
    events = json.loads(chrome_trace(timelines))["traceEvents"]
    assert sum(event["ph"] == "X" for event in events) == len(attention) + len(ffn)


def test_a_directory_without_a_timeline_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match="holds no timeline"):
        read_timeline(tmp_path)
    np.save(tmp_path / "x.npy", np.zeros(3))
    with pytest.raises(UserError, match="not a timeline of this version"):
        read_timeline(tmp_path)


def test_the_command_draws_a_gantt_and_says_what_devices_waited_for(tmp_path, tiny_checkpoints, capsys):
    """The commands of the README, shortened: a run that records itself, and its timeline drawn."""
    from serving.generate import main as generate
    from serving.timeline import main

    directory = tmp_path / "timeline"
    arguments = ["--model", str(tiny_checkpoints["mixtral"]), "--prompt-ids", "1,2,3", "--max-new-tokens", "4"]
    assert generate([*arguments, "--option", f"timeline_dir={directory}"]) == 0
    assert main([str(directory)]) == 0
    printed = capsys.readouterr().out
    assert "cpu-0" in printed
    assert "waiting for attention" in printed
    assert (directory / "gantt.png").stat().st_size > 5000
    assert json.loads((directory / "trace.json").read_text())["traceEvents"]
    assert main([str(directory), "--from-ms", "1e9"]) == 2
