"""The resident executor: models of different sizes, rules and kinds of layer in one queue, against the plain layer."""

from __future__ import annotations

import pytest
import torch

from kernels.moe_ffn import ExpertWeights
from kernels.resident_ffn import FFNLayer, ffn_layer

pytestmark = pytest.mark.cpu


def routed(num_experts, top_k, depth, width, shared_width, rule, dtype, device, groups=(1, 1)) -> FFNLayer:
    def matrix(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, device=device) * shape[-1] ** -0.5).to(dtype)

    shared = (matrix(2 * shared_width, depth), matrix(depth, shared_width)) if shared_width else (None, None)
    return FFNLayer(
        matrix(num_experts, depth) * 4,
        ExpertWeights(matrix(num_experts, 2 * width, depth), matrix(num_experts, depth, width)),
        *shared,
        torch.randn(num_experts, device=device) if rule == "sigmoid_bias" else None,
        top_k,
        rule,
        1.5,
        *groups,
    )


def dense(depth, width, dtype, device) -> FFNLayer:
    gate_up = (torch.randn(2 * width, depth, device=device) * depth**-0.5).to(dtype)
    down = (torch.randn(depth, width, device=device) * width**-0.5).to(dtype)
    return FFNLayer(shared_gate_up=gate_up, shared_down=down)


def models(dtype, device) -> list[list[FFNLayer]]:
    unit = 16 if device.type == "cuda" else 8  # odd sizes where the interpreter runs
    first = [
        dense(5 * unit, 9 * unit, dtype, device),
        routed(6, 2, 5 * unit, 3 * unit, 0, "softmax_topk_renorm", dtype, device),
    ]
    second = [
        routed(20, 3, 3 * unit, 2 * unit, 5 * unit, "sigmoid_bias", dtype, device, (4, 2)),
        routed(9, 4, 3 * unit, unit, unit, "softmax", dtype, device),
    ]
    return [first, second]


class Driver:
    """An executor that computes on demand: resident beside us on CUDA, run in between under the interpreter.

    Once the worker is resident nothing may load a module or allocate: make inputs and expectations first.
    """

    def __init__(self, models, dtype, device, **options) -> None:
        from kernels.resident_ffn import ResidentFFN

        self.executor = ResidentFFN(models, dtype, device, **options)
        self.resident = device.type == "cuda"
        if self.resident:  # a first run loads every module before a kernel that never returns is on the card
            self.executor.submit(0, 0, 0, torch.zeros(1, models[0][0].depth, dtype=dtype, device=device))
            self.executor.run_pending()
            self.executor.collect(0, 1, models[0][0].depth)
            torch.cuda.synchronize(device)
            self.executor.start()

    def settle(self) -> None:
        if not self.resident:
            self.executor.run_pending()


TASKS = [(0, 1, 2, 1), (1, 0, 0, 3), (0, 0, 1, 5), (1, 1, 2, 20), (0, 1, 0, 17)]  # model, layer, slot, rows


def test_any_layer_of_any_model(dtype, device, check):
    served = models(dtype, device)
    inputs = [torch.randn(rows, served[m][n].depth, device=device).to(dtype) for m, n, _, rows in TASKS]
    expected = [ffn_layer(served[m][n], x) for (m, n, _, _), x in zip(TASKS, inputs, strict=True)]
    results = [torch.empty_like(x) for x in inputs]
    driver = Driver(served, dtype, device, num_slots=3, max_rows=20)
    for (model, layer, slot, rows), x, result in zip(TASKS, inputs, results, strict=True):
        driver.executor.submit(model, layer, slot, x)
        driver.settle()
        driver.executor.collect(slot, rows, x.shape[1], result)
    driver.executor.stop()
    for task, actual, wanted in zip(TASKS, results, expected, strict=True):
        check(f"(model, layer, slot, rows) {task}", actual, wanted)


def test_several_in_flight_and_the_ring_wraps(device, check):
    served = models(torch.float32, device)
    rounds = [[torch.randn(2, served[slot][1].depth, device=device) for slot in range(2)] for _ in range(3)]
    expected = [ffn_layer(served[slot][1], x) for inputs in rounds for slot, x in enumerate(inputs)]
    results = [torch.empty_like(x) for inputs in rounds for x in inputs]
    driver = Driver(served, torch.float32, device, num_slots=2, max_rows=4, capacity=3)
    for index, inputs in enumerate(rounds):
        for slot, x in enumerate(inputs):
            driver.executor.submit(slot, 1, slot, x)
        driver.settle()
        for slot, x in enumerate(inputs):
            driver.executor.collect(slot, *x.shape, results[2 * index + slot])
    driver.executor.stop()
    for index, (actual, wanted) in enumerate(zip(results, expected, strict=True)):
        check(f"round {index // 2} slot {index % 2}", actual, wanted)


def test_waiting_for_what_never_comes_is_reported(device):
    from kernels.resident_ffn import ResidentFFN

    served = [[dense(16, 16, torch.float32, device)]]
    executor = ResidentFFN(served, torch.float32, device, num_slots=1, max_rows=1, max_spins=20)
    executor.submit(0, 0, 0, torch.ones(1, 16, device=device))
    executor.collect(0, 1, 16)
    with pytest.raises(RuntimeError, match="a result did not come in time"):
        executor.check()


def test_an_overfull_ring_is_reported(device):
    from kernels.resident_ffn import ResidentFFN

    served = [[dense(16, 16, torch.float32, device)]]
    executor = ResidentFFN(served, torch.float32, device, num_slots=3, max_rows=1, capacity=2, max_spins=20)
    for slot in range(3):
        executor.submit(0, 0, slot, torch.ones(1, 16, device=device))
    with pytest.raises(RuntimeError, match="the ring stayed full"):
        executor.check()


def test_a_layer_without_weights_is_refused():
    with pytest.raises(ValueError, match="needs experts, a shared FFN, or both"):
        FFNLayer()
    with pytest.raises(ValueError, match="a router needs experts"):
        FFNLayer(router=torch.zeros(2, 2), shared_down=torch.zeros(2, 2))
    with pytest.raises(ValueError, match="shared_down: .* must be contiguous"):
        FFNLayer(shared_gate_up=torch.zeros(4, 2), shared_down=torch.zeros(3, 2).T)


def test_a_worker_that_would_take_all_registers_is_refused(device):
    from kernels.resident_ffn.executor import Blocks

    with pytest.raises(ValueError, match="8 warps of the resident worker take all registers"):
        Blocks(num_warps=8)
