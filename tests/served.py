"""Systems on cards against the judge: what the tests of one card and of several have in common."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import judges

from serving.generate import generate
from serving.interface import Cluster, Demand, Placement, Request, ServedModel, System
from serving.spec import load_spec

CHUNK = 16
OPTIONS = {"max_batch": 4, "prefill_chunk": CHUNK, "page_bytes": 2 << 20, "max_running": 16}


def _requests_for(model: ServedModel, rng: random.Random, first_id: int) -> list[Request]:
    lengths = [1, 2 * CHUNK + 5] + [rng.randint(2, 3 * CHUNK) for _ in range(3)]
    prompts = [tuple(rng.randrange(model.spec.vocab_size) for _ in range(length)) for length in lengths]
    return [Request(first_id + i, model.name, prompt, rng.randint(2, 9)) for i, prompt in enumerate(prompts)]


def served(checkpoints: Mapping[str, Path], architectures: Sequence[str]) -> list[ServedModel]:
    """One model of each of `architectures`, named after it, in float32."""
    return [ServedModel(load_spec(checkpoints[a], name=a), checkpoints[a], "float32") for a in architectures]


def with_kv_pages(placement: Placement, pages: int, page_bytes: int) -> Placement:
    """`placement` with every KV pool cut to `pages` pages."""
    kv_bytes = pages * page_bytes
    devices = tuple(
        dataclasses.replace(
            plan, kv_bytes=kv_bytes if plan.kv_bytes else 0, kv_quota_bytes=dict.fromkeys(plan.kv_quota_bytes, kv_bytes)
        )
        for plan in placement.devices
    )
    return dataclasses.replace(placement, devices=devices)


def check_tokens(
    system: System, cluster: Cluster, architectures: Sequence[str], checkpoints: Mapping[str, Path], seed: str
) -> None:
    """Serve five requests of each of `architectures` in float32, all at once and mixed. Raises AssertionError where a token is
    not the judge's, or where KV or a process is left."""
    models = served(checkpoints, architectures)
    rng = random.Random(seed)
    requests = [request for i, model in enumerate(models) for request in _requests_for(model, rng, 100 * i)]
    rng.shuffle(requests)
    try:
        system.start(system.plan(cluster, models, Demand()))
        tokens = generate(system, requests)
        last = system.pool_samples()[-1]
        assert sum(last.pages_in_use.values()) == 0
    finally:
        system.stop()
    assert not judges.worker_processes()
    for request in requests:
        expected = judges.greedy_reference(checkpoints[request.model], request.prompt, request.max_new_tokens)
        assert tokens[request.request_id] == expected, f"{request.model}, prompt of {len(request.prompt)} tokens"
