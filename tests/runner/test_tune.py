"""The search of options before a run: it takes the best of what it tried, says what that was, and repeats."""

import copy
import json
from pathlib import Path

import hydra
import pytest
import yaml
from omegaconf import OmegaConf

from runner.config import bench_from_dict
from runner.identity import config_hash
from runner.run import execute
from serving import registry
from serving.errors import UserError

pytestmark = pytest.mark.cpu

CONF = Path(__file__).resolve().parents[2] / "conf"
SYSTEMS = sorted(path.stem for path in (CONF / "system").glob("*.yaml") if not path.stem.startswith("paper-"))
SMALL = CONF / "tune" / "small.yaml"


@pytest.fixture
def content(tiny_checkpoints, tmp_path):
    return {
        "experiment": "tune",
        "results_dir": str(tmp_path),
        "system": {"name": "static", "options": {"page_bytes": 4096, "max_batch": 2}},
        "models": [{"name": name, "checkpoint": str(tiny_checkpoints[name])} for name in ("mixtral", "deepseek_v2")],
        "devices": [{"name": f"cpu:{i}", "index": i, "memory_mib": 8} for i in range(2)],
        "workload": {
            "arrivals": {"kind": "poisson", "rate_rps": 2000.0},
            "duration_s": 0.05,
            "lengths": {"kind": "uniform", "prompt_max": 20, "output_min": 20, "output_max": 40},
        },
        "slo": {"ttft_ms": 100, "tpot_ms": 10},
        "backend": {"name": "sim", "card": "h200"},
        "tracking": {"mode": "disabled"},
    }


def run(content, force=False, **tune):
    content = copy.deepcopy(content)
    if tune:
        content["tune"] = tune
    return execute(bench_from_dict({**content, "force": force})).record


def test_the_best_setting_tried_is_used_and_recorded(content):
    record = run(content, options={"max_batch": [1, 2, 8], "prefill_chunk": [8, 64]})
    tuning = record.content["tuning"]
    assert [tried["options"]["max_batch"] for tried in tuning["tried"]][:3] == [2, 1, 8]
    assert tuning["chosen"]["max_batch"] == 8 and set(tuning["chosen"]) == {"max_batch", "prefill_chunk"}
    best = max(tuning["tried"], key=lambda tried: (round(tried["slo_attainment"], 3), -tried["mean_e2el_ms"]))
    assert best["options"].items() <= {"page_bytes": 4096, **tuning["chosen"]}.items()
    content["system"]["options"] |= tuning["chosen"]
    by_hand = run(content)
    assert by_hand.content["tuning"] == {}
    assert record.metrics["mean_e2el_ms"] == by_hand.metrics["mean_e2el_ms"]


def test_a_search_repeats(content):
    first, second = (run(content, force=True, options={"max_batch": [1, 8]}, requests=20) for _ in range(2))
    assert first.content["tuning"] == second.content["tuning"]
    assert first.content["tuning"]["requests"] == 20


def test_a_setting_that_does_not_fit_is_passed_over(content):
    tuning = run(content, options={"max_batch": [8, 50000]}).content["tuning"]
    assert tuning["chosen"] == {"max_batch": 8}
    assert "are missing" in tuning["tried"][-1]["error"]


def test_options_that_a_system_does_not_have_are_not_its_to_tune(content):
    tuning = run(content, options={"lanes": [2]}, systems={"static": {"prefill_chunk": [16]}}).content["tuning"]
    assert list(tuning["chosen"]) == ["prefill_chunk"] and tuning["chosen"]["prefill_chunk"] in (16, 128)


def test_a_cell_where_no_setting_fits_fails_with_the_reason_in_its_record(content, tmp_path):
    content["devices"] = content["devices"][:1]
    content["devices"][0]["memory_mib"] = 1
    with pytest.raises(UserError, match="none of 3 settings can be tried: .* are missing"):
        run(content, options={"max_batch": [1, 4]})
    (path,) = (tmp_path / "tune").glob("*/record.json")
    record = json.loads(path.read_text())
    assert record["status"] == "failed" and "are missing" in record["error"]


def test_a_run_without_a_search_keeps_its_identity(content):
    plain, searched = bench_from_dict(content), bench_from_dict({**content, "tune": {"options": {"max_batch": [1]}}})
    assert "tune" not in plain.identity()
    assert config_hash(plain.identity()) != config_hash(searched.identity())


@pytest.mark.parametrize("tune", [{"options": {"max_batch": 4}}, {"options": {"max_batch": []}}])
def test_a_search_of_no_values_is_refused(tune, content):
    with pytest.raises(UserError, match="a list of values to try is wanted"):
        run(content, **tune)


@pytest.mark.parametrize("preset", SYSTEMS)
def test_every_system_has_a_value_of_its_own_to_tune_or_a_reason_why_not(preset):
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        composed = hydra.compose("bench", [f"system={preset}", "tune=small"])
    content = OmegaConf.to_container(composed, resolve=True)
    name, options = content["system"]["name"], content["system"]["options"]
    declared = yaml.safe_load(SMALL.read_text())["systems"][name]
    known = registry.all_options(name, options)
    assert set(declared) <= set(known)
    for option, values in declared.items():
        for value in values:
            registry.create(name, {**options, option: value})
    if not declared:
        (line,) = (line for line in SMALL.read_text().splitlines() if line.strip().startswith(f"{name}:"))
        assert len(line.partition("#")[2].split()) > 3, "an empty search says why"


def test_a_rule_that_makes_a_variant_stays(content):
    content["system"] = {"name": "elastic", "options": {"page_bytes": 4096, "admission": "cap"}}
    search = {"options": {"max_batch": [2, 8]}, "systems": {"elastic": {"admission": ["optimistic", "reserved"]}}}
    assert set(run(content, **search).content["tuning"]["chosen"]) == {"max_batch"}
    content["system"]["options"]["admission"] = "optimistic"
    assert set(run(content, **search).content["tuning"]["chosen"]) == {"max_batch", "admission"}
