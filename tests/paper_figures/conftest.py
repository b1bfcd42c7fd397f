"""Records made up by the tests, in the format of runner/SCHEMA.md. Their numbers come from no run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

MADE_UP = "made-up test machine"


@pytest.fixture
def write_run(tmp_path):
    """`write_run(system, ...)` writes one made-up record below `tmp_path` and returns its directory."""

    def write(
        system: str = "crosspool",
        experiment: str = "made-up",
        seed: int = 0,
        rate: float = 2.0,
        alpha: float = 0.0,
        prompt: int = 64,
        num_models: int = 2,
        options: dict | None = None,
        status: str = "complete",
        scale: float = 1.0,
        backend: str = "real",
        timeline: bool = False,
        repeat: int = 0,
        **metrics,
    ) -> Path:
        options = options or {"lanes": 2, "control": "lowered"}
        name = f"{system}-{backend}-{experiment}-{seed}-{rate}-{alpha}-{prompt}-{num_models}-{'-'.join(map(str, options.values()))}-{repeat}"
        directory = tmp_path / experiment / name
        directory.mkdir(parents=True)
        models = [f"model-{i}" for i in range(num_models)]
        rows = _requests(np.random.default_rng(seed), models, scale) if status == "complete" else []
        _write_rows(directory, rows, models)
        if timeline:
            pq.write_table(_timeline(), directory / "timeline.parquet")
        content = {
            "schema_version": 1,
            "run_id": name,
            "config_hash": name,
            "status": status,
            "error": "" if status == "complete" else "made-up: does not fit, 17 bytes are missing",
            "experiment": experiment,
            "system": system,
            "backend": backend,
            "hardware": MADE_UP,
            "command": f"bench.py experiment={experiment}",
            "config": {
                "backend": {"name": backend},
                "repeat": repeat,
                "system": {"name": system, "options": options},
                "models": [{"name": model} for model in models],
                "devices": [{"name": "cpu:0", "kind": "cpu", "memory_mib": 1}],
                "workload": {
                    "arrivals": {"rate_rps": rate, "rate_of": "total"},
                    "popularity": {"alpha": alpha},
                    "lengths": {"kind": "fixed", "prompt_min": 1, "prompt_max": prompt, "output_max": 8},
                    "seeds": {"schedule": seed, "model": 0},
                },
            },
            "provenance": {"git": {"revision": "0", "dirty": False}, "hardware": {"cpu": MADE_UP, "gpus": []}},
            "placement": [
                {
                    "device": f"cpu:{i}",
                    "role": system,
                    "memory_bytes": 1 << 20,
                    "kv_bytes": 1 << 18,
                    "weights_bytes": dict.fromkeys(models, 1000),
                    "kv_quota_bytes": dict.fromkeys(models, (1 << 18) // num_models) if system == "static" else {},
                }
                for i in range(2)
            ],
            "metrics": {**_metrics(rows, scale), **metrics} if rows else {},
            "metrics_by_model": {m: _metrics([r for r in rows if r["model"] == m], scale) for m in models}
            if rows
            else {},
        }
        (directory / "record.json").write_text(json.dumps(content))
        return directory

    return write


def _timeline() -> pa.Table:
    spans = [
        {
            "device": device, "stage": stage, "lane": lane, "model": lane, "layer": layer, "rows": 1,
            "start_ns": start, "end_ns": start + 10**5,
        }
        for layer in range(30)
        for lane in range(2)
        for device, stage, start in (
            ("cpu-0", "attention", (4 * layer + 2 * lane) * 10**5), ("cpu-1", "ffn", (4 * layer + 2 * lane + 1) * 10**5)
        )
    ]  # fmt: skip
    return pa.Table.from_pylist(spans)


@pytest.fixture
def write_study(tmp_path):
    """`write_study(kind, rows)` writes one made-up study below `tmp_path`."""

    def write(kind: str, rows: list[dict], **more) -> Path:
        path = tmp_path / kind / f"{kind}-made-up" / "study.json"
        path.parent.mkdir(parents=True)
        told = {"kind": kind, "name": path.parent.name, "backend": "real", "hardware": MADE_UP, "command": "made up"}
        path.write_text(json.dumps({"schema_version": 1, **told, **more, "rows": rows}))
        return path

    return write


def _requests(rng, models: list[str], scale: float) -> list[dict]:
    rows = []
    for number in range(12):
        planned = number * 10**8
        times = planned + np.cumsum(rng.integers(10**6, 10**7, size=5) * scale).astype(int)
        rows.append(
            {
                "request_id": number,
                "model": models[number % len(models)],
                "prompt_tokens": 8,
                "output_tokens": 5,
                "planned_ns": planned,
                "outcome": "rejected" if number == 11 else "completed",
                "token_times_ns": [] if number == 11 else times.tolist(),
            }
        )
    return rows


def _write_rows(directory: Path, rows: list[dict], models: list[str]) -> None:
    pq.write_table(pa.Table.from_pylist(rows or [{"request_id": 0}]), directory / "requests.parquet")
    series = [
        {
            "time_ns": t * 10**8, "pool": "kv", "model": model, "pages_in_use": (t * (i + 1)) % 7,
            "page_budget": 20, "page_bytes": 4096,
        }
        for t in range(30)
        for i, model in enumerate(models)
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(series), directory / "series.parquet")


def _metrics(rows: list[dict], scale: float) -> dict:
    done = [row for row in rows if row["outcome"] == "completed"]
    gaps = np.concatenate([np.diff(row["token_times_ns"]) for row in done] or [[0]]) / 1e6
    ttft = np.array([row["token_times_ns"][0] - row["planned_ns"] for row in done] or [0]) / 1e6
    metrics = {
        "num_requests": len(rows), "completed": len(done), "rejected": len(rows) - len(done), "failed": 0,
        "preemptions": 0, "output_throughput": 100 / scale, "request_goodput": 1.5, "request_throughput": 1.5,
        "slo_attainment": 0.9, "offered_rate_rps": 2.0, "peak_kv_share": 0.5,
    }  # fmt: skip
    for name, values in (("itl_ms", gaps), ("ttft_ms", ttft)):
        metrics[f"mean_{name}"] = float(np.mean(values))
        for stat, level in (("median", 50), ("p95", 95), ("p99", 99)):
            metrics[f"{stat}_{name}"] = float(np.percentile(values, level))
    return metrics
