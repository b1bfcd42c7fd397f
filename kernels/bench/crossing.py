"""What can only be measured with two kernels running at once: a mailbox's crossing and the resident FFN's answer.

CUDA only. On one card two streams stand for two devices; spins are bounded, so a failure ends in an error code within
seconds, never in a hang.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from kernels.bench.cases import QWEN3
from kernels.bench.measure import capture
from kernels.bench.problems import expert_weights
from kernels.mailbox import Mailbox, put, wait
from kernels.resident_ffn import FFNLayer, ResidentFFN, ffn_layer

MAX_SPINS = 500_000  # some tenths of a second
ROUNDS = 50


def crossing_seconds(
    num_rows: int, width: int, device: torch.device, dtype: torch.dtype, other: torch.device | None = None
) -> float:
    """One way of a ping-pong of `num_rows` rows between streams of `device` and `other` (the same by default), which can reach
    each other's memory: put to end of wait, control lowered into graphs. Raises RuntimeError if a wait gave up or the rows
    that came back are not the rows sent."""
    other = other or device
    there = Mailbox.allocate(1, num_rows, width, dtype, reader=other, writer=device)
    back = Mailbox.allocate(1, num_rows, width, dtype, reader=device, writer=other)
    x = torch.randn(num_rows, width, device=device).to(dtype)
    received = torch.zeros_like(x)

    def ping() -> None:
        put(there, 0, x)
        received.copy_(wait(back, 0, num_rows, width, MAX_SPINS))

    def pong() -> None:
        put(back, 0, wait(there, 0, num_rows, width, MAX_SPINS))

    put(there, 0, x)  # compiles and loads everything before anything spins for long
    torch.cuda.synchronize(device)
    with torch.cuda.device(other):
        pong()
        torch.cuda.synchronize(other)
    received.copy_(wait(back, 0, num_rows, width, MAX_SPINS))
    torch.cuda.synchronize(device)
    graphs = [capture([side] * ROUNDS, card) for side, card in ((ping, device), (pong, other))]
    streams = [torch.cuda.Stream(card) for card in (device, other)]
    times = []
    for _ in range(5):
        torch.cuda.synchronize(device)
        torch.cuda.synchronize(other)
        start = time.perf_counter()
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize(device)
        torch.cuda.synchronize(other)
        times.append((time.perf_counter() - start) / (2 * ROUNDS))
        if int(there.error) or int(back.error):
            raise RuntimeError("a wait gave up: the two streams did not run at once")
    if not received.equal(x):
        raise RuntimeError("the rows that came back are not the rows sent")
    return sorted(times)[len(times) // 2]


def resident_seconds(num_rows: int, device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """(seconds of one submit-to-collect of the Qwen3 shape, router included; relative error of the result)."""
    depth, width, num_experts, top_k = QWEN3
    router = torch.randn(num_experts, depth, device=device).to(dtype) * depth**-0.5
    weights = expert_weights(num_experts, depth, width, device, dtype)
    layer = FFNLayer(router, weights, top_k=top_k, rule="softmax_renorm")
    inputs = [torch.randn(num_rows, depth, device=device).to(dtype) for _ in range(8)]
    expected = ffn_layer(layer, inputs[-1])
    executor = ResidentFFN([[layer]], dtype, device, num_slots=2, max_rows=num_rows, max_spins=MAX_SPINS)
    outputs: list[torch.Tensor] = []

    def step(x: torch.Tensor) -> Callable[[], None]:
        def run() -> None:
            executor.submit(0, 0, 0, x)
            outputs.append(executor.collect(0, num_rows, depth))

        return run

    executor.submit(0, 0, 0, inputs[0])
    executor.run_pending()
    executor.collect(0, num_rows, depth)
    torch.cuda.synchronize(device)
    graph = capture([step(x) for x in inputs])
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    executor.start()
    stream = torch.cuda.Stream(device)
    times = []
    with torch.cuda.stream(stream):
        try:
            for _ in range(9):
                events[0].record()
                graph.replay()
                events[1].record()
                stream.synchronize()
                times.append(events[0].elapsed_time(events[1]) / 1e3 / len(inputs))
                executor.check()
        finally:
            executor.stop()
    error = float((outputs[-1].double() - expected.double()).norm() / expected.double().norm())
    return sorted(times)[len(times) // 2], error
