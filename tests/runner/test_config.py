"""A configuration is checked where it comes in, and two spellings of one run have one identity."""

import copy

import pytest

from runner.config import bench_from_dict
from runner.identity import config_hash
from serving.errors import UserError

pytestmark = pytest.mark.cpu

CONTENT = {
    "experiment": "e",
    "system": {"name": "static", "options": {}},
    "models": [{"name": "m", "checkpoint": "/c"}],
    "devices": [{"name": "cpu:0", "memory_mib": 8}],
    "workload": {"rate": None, "arrivals": {"rate_rps": 2.0}},
    "slo": {"ttft_ms": 100, "tpot_ms": 10},
}


def config_with(path="", value=None):
    content = copy.deepcopy(CONTENT)
    *parents, last = path.split(".") if path else [""]
    node = content
    for part in parents:
        node = node[int(part)] if isinstance(node, list) else node[part]
    if path:
        node[int(last) if isinstance(node, list) else last] = value
    return bench_from_dict(content)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("slo.ttft_ms", "abc", "slo.ttft_ms is 'abc'; it must be a number"),
        ("slo.ttft_ms", None, "slo.ttft_ms is None"),
        ("slo.tpot_ms", float("nan"), "slo.tpot_ms is nan"),
        ("slo.tpot_ms", 0, "slo.tpot_ms is 0; it must be a positive number"),
        ("slo.e2el_ms", 1, "slo: unknown key 'e2el_ms'; known: ttft_ms, tpot_ms"),
        ("devices.0.memory_mib", 1.5, r"devices\[0\].memory_mib is 1.5; it must be a whole number"),
        ("devices.0.memory_mib", True, r"devices\[0\].memory_mib is True"),
        ("devices.0.memory_mib", 0, "memory_mib is 0; it must be at least 1"),
        ("devices", [], "devices: none given"),
        ("models", 3, "models: a list is wanted, got 3"),
        ("models.0", 3, r"models\[0\]: a mapping is wanted"),
        ("models.0.make", 3, r"models\[0\].make is 3; it must be a mapping"),
        ("models.0.dtype", "int7", "unknown dtype 'int7'; known: "),
        ("models.0", {"checkpoint": "/c"}, r"models\[0\]: .*'name'"),
        ("system", None, "system: a mapping is wanted"),
        ("system.options", [1], r"system.options is \[1\]; it must be a mapping"),
        ("workload", None, "workload is None; it must be a mapping"),
        ("force", "maybe", "force is 'maybe'; it must be true or false"),
        ("drain_timeout_s", True, "drain_timeout_s is True; it must be a number"),
        ("drain_timeout_s", -1, "drain_timeout_s is -1; it must be a positive number"),
        ("repeat", -1, "repeat is -1; it must be at least 0"),
        ("experiment", "../x", "must be a plain folder name"),
        ("experiment", ".hidden", "must be a plain folder name"),
        ("experiment", "", "must be a plain folder name"),
        ("backend", {"name": "gpu"}, "unknown backend 'gpu'; known: real, sim"),
        ("tracking", {"mode": "on"}, "unknown tracking.mode 'on'; known: offline"),
    ],
)
def test_a_value_that_makes_no_sense_is_named_with_what_would(path, value, words):
    with pytest.raises(UserError, match=words):
        config_with(path, value)


def test_a_name_may_look_like_a_number():
    assert config_with("experiment", 7).experiment == "7"


def test_a_run_has_one_identity_however_it_is_spelled():
    def identity(path, value):
        return config_hash(config_with(path, value).identity())

    run = identity("workload.arrivals.rate_rps", 5)
    assert identity("workload.arrivals.rate_rps", 5.0) == run == identity("workload.rate", 5)
    assert identity("slo.ttft_ms", 100.0) == identity("slo.ttft_ms", 100)
    assert identity("workload.rate", 5.5) != run


def test_runs_that_repeat_one_another_are_kept_apart_and_older_records_are_still_found():
    assert "repeat" not in config_with().identity()
    assert len({config_hash(config_with("repeat", repeat).identity()) for repeat in range(3)}) == 3


def test_where_a_record_goes_is_no_part_of_what_the_run_is():
    run = config_with().identity()
    for path, value in (("results_dir", "/r"), ("force", True), ("experiment", "other"), ("tracking", {"group": "g"})):
        assert config_with(path, value).identity() == run


def test_one_entry_may_stand_for_many_devices_in_several_nodes():
    config = config_with("devices", [{"name": "gpu", "kind": "cuda", "count": 4, "per_node": 2, "memory_mib": 8}])
    assert [(d.name, d.index, d.node) for d in config.devices] == [
        ("gpu:0", 0, 0), ("gpu:1", 1, 0), ("gpu:2", 2, 1), ("gpu:3", 3, 1)
    ]  # fmt: skip
    with pytest.raises(UserError, match="count and per_node are whole numbers"):
        config_with("devices", [{"name": "gpu", "count": 0, "memory_mib": 8}])
    with pytest.raises(UserError, match="names must differ, got a, a"):
        config_with("devices", [{"name": "a", "memory_mib": 8}, {"name": "a", "memory_mib": 8}])
