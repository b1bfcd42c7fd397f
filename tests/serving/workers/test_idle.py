"""A worker without requests costs the core it shares next to nothing, and takes a request when one comes."""

import time

import judges
import pytest
from served import served

from serving import registry
from serving.generate import cpu_cluster, generate
from serving.interface import Demand, Request

pytestmark = pytest.mark.cpu

IDLE_S = 0.5
MOST_WAKES_PER_S = 200  # to look at the control ring; a worker that naps between looks has thousands


@pytest.mark.parametrize("name", ["static", "elastic", "swap"])
def test_an_idle_worker_sleeps_and_takes_the_next_request(name, tiny_checkpoints):
    (model,) = served(tiny_checkpoints, ["qwen3_moe"])
    system = registry.create(name, {"page_bytes": 4096, "max_batch": 2})
    request = Request(0, model.name, (5, 6, 7), 4)
    try:
        system.start(system.plan(cpu_cluster(1, 64 << 20), [model], Demand()))
        first = generate(system, [request])
        time.sleep(0.2)  # it spins for a while before it sleeps
        (worker,) = judges.worker_processes()
        before = worker.num_ctx_switches().voluntary
        time.sleep(IDLE_S)
        assert worker.num_ctx_switches().voluntary - before < MOST_WAKES_PER_S * IDLE_S
        assert generate(system, [request]) == first
    finally:
        system.stop()
