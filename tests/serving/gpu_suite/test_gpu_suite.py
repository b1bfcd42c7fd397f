"""The suite's own parts: sections that fail leave the others alone, and times become the figures that are shown."""

import importlib.util
from pathlib import Path

import pytest

from serving import registry
from serving.cost.table1 import published_spec
from serving.errors import UserError
from serving.gpu_suite import __main__ as suite
from serving.gpu_suite import serve, show
from serving.interface import Demand, Request, ServedModel
from serving.spec import load_spec

pytestmark = pytest.mark.cpu


@pytest.fixture
def sections(monkeypatch):
    commands = {
        "good": ("-c", "print('row: 1 us')"),
        "bad": ("-c", "import sys; print('what went wrong'); sys.exit(3)"),
        "slow": ("-c", "print('row: half', flush=True); import time; time.sleep(60)"),
    }
    monkeypatch.setattr(suite, "SECTIONS", {name: suite.Section(parts, 3) for name, parts in commands.items()})


def test_every_section_runs_whatever_becomes_of_the_others(sections, tmp_path, capsys):
    assert suite.main(["--out", str(tmp_path), "bad", "slow", "good"]) == 1
    table = capsys.readouterr().out.split("=" * 100)[1]
    assert "bad [FAILED (3)" in table
    assert "what went wrong" in table
    assert "slow [FAILED (ended: too slow)" in table
    assert "half" in table
    assert "good [ok" in table
    assert (tmp_path / "slow.log").read_text().startswith("row: half")


def test_a_run_without_failures_ends_well(sections, tmp_path):
    assert suite.main(["--out", str(tmp_path), "good"]) == 0


def test_a_section_that_needs_more_cards_is_skipped_and_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(suite, "SECTIONS", {"many": suite.Section(("-c", "import sys; sys.exit(3)"), 3, cards=99)})
    assert suite.main(["--out", str(tmp_path)]) == 0
    assert "many [skipped" in (table := capsys.readouterr().out) and "needs 99 cards" in table


def test_unknown_sections_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        suite.main(["--out", str(tmp_path), "kernel"])
    assert "unknown section 'kernel'" in capsys.readouterr().err


def test_summary_of_known_times():
    """Two requests, planned at 0 and 1 s: first tokens after 0.5 and 1 s, gaps of 0.1, 0.1 and 0.4 s."""
    found = serve.summary({0: [0.0, 0.5, 0.6, 0.7], 1: [1.0, 2.0, 2.4]})
    assert found["tbt_mean_s"] == pytest.approx(0.2)
    assert found["tbt_p99_s"] == pytest.approx(0.4)
    assert found["ttft_mean_s"] == pytest.approx(0.75)
    assert found["tokens_per_s"] == pytest.approx(5 / 2.4)


def test_every_system_gets_the_same_requests_and_bytes(tiny_checkpoints, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    model = ServedModel(load_spec(tiny_checkpoints["mixtral"]), tiny_checkpoints["mixtral"])
    assert serve.requests_of([model], 5.0, 6, seed=1) == serve.requests_of([model], 5.0, 6, seed=1)
    sizes = {
        name: serve.cluster_for(name, 3 << 30, 5 << 30).memory_bytes for name in ("static", "elastic", "crosspool")
    }
    assert set(sizes.values()) == {8 << 30}


def test_sections_name_modules_that_exist():
    for section in suite.SECTIONS.values():
        assert importlib.util.find_spec(section.command[1]), section.command


@pytest.mark.parametrize("name", ["h200", "h200x2"])
def test_shipped_tables_are_those_of_the_shipped_results(name):
    folder = Path(__file__).parents[3] / "results" / name
    assert show.render(folder) in (folder / "README.md").read_text()


def test_a_folder_without_results_is_named(tmp_path):
    with pytest.raises(UserError, match="engine.json is not a result"):
        show.render(tmp_path)


def test_p99_of_each_model_and_against_the_same_load():
    requests = [(0.0, Request(0, "a", (1,), 2)), (0.0, Request(1, "b", (1,), 2))]
    slow, quick = ({0: [0.0, 1.0, 1.5], 1: [0.0, 1.0, gap]} for gap in (1.3, 1.1))
    load = {"rate_rps": 2.0, "kv_gib": 1.0, "skew": 0.9, "seed": 0}
    rows = [
        {**load, "system": name, "p99_by_model": serve.p99_by_model(times, requests)}
        for name, times in (("crosspool lowered", quick), ("elastic", slow))
    ]
    serve._compare(rows, "crosspool lowered")
    assert rows[-1]["p99_over"] == pytest.approx({"a": 1.0, "b": 3.0})


def test_both_pools_and_shared_devices_plan_within_the_same_bytes(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    models = [
        ServedModel(published_spec(name), Path(), "bfloat16", dummy=True)
        for name in ("deepseek-v2-lite", "qwen3-30b-a3b")
    ]
    for label in ("crosspool lowered", "elastic", "static"):
        name, options = serve.SYSTEMS[label]
        cluster = serve.cluster_for(name, *serve.pool_bytes(models, 2 << 30))
        plans = registry.create(name, {**serve.OPTIONS, **options}).plan(cluster, models, Demand()).devices
        assert 1 << 30 < sum(plan.kv_bytes for plan in plans) < 2 << 30


def test_two_batches_in_flight_are_told_beside_what_the_slower_side_could_do():
    """4 tokens each 2 ms of the FFN alone are 2,000 a second; other rows have no such figure."""
    sides = {"model": "m", "lanes": 2, "batch": 4, "attention_s": 0.001, "ffn_s": 0.002, "tokens_per_s": 1500.0}
    table = show.sides_table([sides, {**sides, "lanes": 1}, {"model": "n", "lanes": 2, "batch": 1, "tbt_s": 0.1}])
    assert table.splitlines()[2:] == ["| m | 4 | 1.00 | 2.00 | 1500 | 2000 | 0.75 |"]


def test_a_system_that_was_refused_stays_in_the_table_with_its_reason():
    times = {"tbt_mean_s": 0.01, "tbt_p99_s": 0.02, "ttft_mean_s": 1.0, "ttft_p99_s": 2.0, "preemptions": 0, "swaps": 3}
    rows = [
        {"system": "static", "kv_gib": 1.0, "error": "CapacityError: a|b are missing"},
        *({"system": "swap", "kv_gib": 1.0, "rate_rps": 2.0, **times, "swaps": swaps} for swaps in (3, 4)),
    ]
    table = show.elastic_table(rows).splitlines()
    assert "a/b are missing" in table[2]
    assert len({line.count("|") for line in table}) == 1
    assert "| 2 | 10.0 | 20.0 | 1000.0 | 2000.0 | 0 | 3.5 |" in table[3]
