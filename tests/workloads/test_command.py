"""`python -m workloads`: presets compose, statistics and figures come out, bad input is one line and status 2."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import hydra
import pytest
from omegaconf import OmegaConf

from workloads.__main__ import main
from workloads.compose import compose
from workloads.config import workload_from_dict
from workloads.files import read_trace
from workloads.generate import build_trace

pytestmark = pytest.mark.cpu

REPOSITORY = Path(__file__).resolve().parents[2]
PRESETS = sorted(path.stem for group in ("workload", "conf") for path in (REPOSITORY / "conf" / group).glob("*.yaml"))
NEEDS_FILES = {"azure", "mooncake", "burstgpt", "sharegpt"}


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_composes_and_builds(name, traces_directory, monkeypatch):
    """Those of real traces too, where the file is there."""
    monkeypatch.setenv("WORKLOAD_TRACES", str(traces_directory))
    config, models, _ = compose(name, [], None)
    if name in NEEDS_FILES and not (traces_directory / config.source.path).is_file():
        pytest.skip(f"{config.source.path} is not in the directory of traces")
    trace = build_trace(config, models)
    assert len(trace) > 0
    if name.startswith("models-"):
        assert len(models) == len({limits.name for limits in models}) == int(name.split("-")[1])


def header_commands() -> list[str]:
    """The commands that stand above the presets of workloads and of scenarios made of them."""
    files = [path for group in ("workload", "conf") for path in (REPOSITORY / "conf" / group).glob("*.yaml")]
    lines = [
        line
        for path in files
        for line in path.read_text().splitlines()
        if line.startswith("#   ")
        and not re.search("paper_figures|runner.soak", line)  # what draws, and what has its own tests
    ]
    return sorted({line.removeprefix("#   ").removeprefix("WORKLOAD_TRACES=DIR ") for line in lines})


@pytest.mark.parametrize("command", header_commands())
def test_the_command_above_a_preset_composes(command):
    """The first cell of a sweep."""
    words = [word for word in shlex.split(command) if word != "-m"]
    overrides = [re.sub(r"=(\[[^\]]*\]|[^\[{,]*),.*", r"=\1", word) for word in words if "=" in word]
    if words[1] == "bench.py":
        with hydra.initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
            content = OmegaConf.to_container(hydra.compose("bench", overrides), resolve=True)
        workload_from_dict(content["workload"])
    else:
        words = words[words.index("describe") + 1 :]
        compose(words[0], overrides, None)


def test_the_sweeps_that_are_asked_for_are_there():
    for family, values in {
        "models": ["2", "4", "8", "16", "32", "64"],
        "context": ["4-8k", "8-16k", "16-32k", "32-64k", "64-128k"],
        "cold": ["0.05", "0.1", "0.2", "0.5", "1.0"],
        "paper-tbt": ["0.2", "0.5", "0.8", "1.0"],
    }.items():
        assert {f"{family}-{value}" for value in values} <= set(PRESETS)
    assert {f"skew{alpha}" for alpha in ("0.0", "0.7", "0.9", "1.3", "1.7", "2.1")} <= set(PRESETS)


@pytest.mark.parametrize("alpha", [0.0, 0.7, 0.9, 1.3, 1.7, 2.1])
def test_skew_presets_say_their_alpha_and_leave_the_arrivals(alpha):
    config, models, _ = compose(f"skew{alpha}", [], None)
    assert config.popularity.alpha == alpha
    base = build_trace(*compose("poisson", [], None)[:2])
    assert (build_trace(config, models).arrival_s == base.arrival_s).all()


def test_describe_prints_expected_against_measured_and_draws(tmp_path, capsys):
    figure = tmp_path / "figure.png"
    overrides = ["workload.duration_s=300", "workload.arrivals.rate_rps=20"]
    assert main(["describe", "tail", "--models", "40", "--plot", str(figure), *overrides]) == 0
    printed = capsys.readouterr().out
    for part in (
        "rate, req/s",
        "CV of gaps",
        "prompt tokens p99",
        "models active in 15 s",
        "coldest 90 %",
        "std errors",
    ):
        assert part in printed
    rate = next(line for line in printed.splitlines() if line.startswith("rate, req/s")).split()
    assert rate[2] == "20" and float(rate[3]) == pytest.approx(20, rel=0.1)
    assert figure.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_generate_writes_what_describe_reads(tmp_path, capsys, suffix):
    path = tmp_path / f"t{suffix}"
    assert main(["generate", "skew0.9", "--out", str(path), "workload.seeds.schedule=4"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["digest"] == read_trace(path).digest
    assert main(["describe", str(path), "--plot", str(tmp_path / "f.pdf")]) == 0
    assert said["digest"][:16] in capsys.readouterr().out


def test_limits_come_from_the_checkpoint_and_assumed_ones_are_said(tmp_path, capsys, tiny_checkpoints):
    path = tmp_path / "mine.yaml"
    path.write_text(
        f"workload: {{duration_s: 10}}\nmodels: [{{name: a, checkpoint: {tiny_checkpoints['mixtral']}}}, {{name: b}}]\n"
    )
    assert main(["generate", str(path), "--out", str(tmp_path / "t.jsonl"), "--context-tokens", "300"]) == 0
    assert [(m.name, m.max_context_tokens) for m in read_trace(tmp_path / "t.jsonl").models] == [("a", 512), ("b", 300)]
    assert "no checkpoint of b: a vocabulary of 32000 and contexts of 300 tokens" in capsys.readouterr().err


def test_a_yaml_file_of_ones_own(tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text("duration_s: 10\narrivals: {rate_rps: 5.0}\n")
    assert main(["generate", str(path), "--out", str(tmp_path / "t.jsonl"), "workload.duration_s=20"]) == 0
    assert read_trace(tmp_path / "t.jsonl").duration_s == 20


def test_describe_of_a_real_trace(traces_directory, capsys):
    assert main(["describe", str(traces_directory / "azure_llm_2023_conv.csv"), "--format", "azure"]) == 0
    printed = capsys.readouterr().out
    assert "19,366" in printed and "CC-BY-4.0" in printed


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["describe", "no-such-preset"], "no preset, no YAML and no trace file; presets: ablation"),
        (["describe", "gone.yaml"], "gone.yaml: no such file"),
        (["describe", "gone.jsonl"], "gone.jsonl: no such trace file"),
        (["describe", "skew0.9", "workload.arrivals.rate_rps=-4"], "rate_rps is -4; it must be a positive number"),
        (["describe", "skew0.9", "workload.popularity.alpha=nan"], "alpha is nan"),
        (["describe", "gamma", "workload.arrivals.cv=20"], "cv is 20; it must be between 0.5 and 8"),
        (["describe", "skew0.9", "workload.nonsense=1"], "nonsense"),
        (["describe", "skew0.9", "--window-s", "-1"], "--window-s is -1"),
        (["describe", "skew0.9", "--models", "0"], "--models is 0"),
        (["describe", "x.csv", "--format", "parchment"], "format is 'parchment'; known: azure"),
        (["generate", "skew0.9", "--out", "t.txt"], "ends in .jsonl or .parquet"),
        (["bench", "--requests", "0"], "each must be 1 or more"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, says, capsys):
    assert main(arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("note: ")]
    assert len(lines) == 1 and lines[0].startswith("error: ") and says in lines[0]


def test_the_commands_exit_status_and_speed():
    """As a process: a bad file's one line with no traceback; a small bench prints each step."""
    command = [sys.executable, "-m", "workloads"]
    bad = subprocess.run(
        [*command, "describe", "gone.csv", "--format", "azure"],
        check=False,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert bad.returncode == 2 and bad.stderr.count("\n") == 1 and bad.stderr.startswith("error: workload.source.path")
    small = ["bench", "--models", "10", "--requests", "2000", "--source-mb", "1"]
    bench = subprocess.run([*command, *small], check=False, cwd=REPOSITORY, capture_output=True, text=True)
    assert bench.returncode == 0, bench.stderr
    assert "read Mooncake JSON lines" in bench.stdout
