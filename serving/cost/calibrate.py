"""Micro-benchmarks of the stages of given models, run as the engine runs them.

`python -m serving.cost calibrate --out FILE --model DIR` writes one JSON file: what the machine reached, every measured
row, and coefficients fitted to the rows. A stage is timed by walking all layers of a model in order, the other half of each
layer run untimed in between, of as many rows, so that weights and KV come from where they come from in a run (the last-level
cache for small models, memory for large ones). What a step does once is measured on the worker (serving/cost/worker_steps.py).

Points say how a stage grows with rows and context. At which level it does is what a worker's steps say, in more moments
(serving/cost/anchoring.py). Because what a run reports are means, so are points: of a skewed distribution of times the median is
not what requests wait for.
"""

from __future__ import annotations

import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from serving.checkpoints import open_weights
from serving.cost.calibrated import MeasuredRow
from serving.errors import UserError
from serving.interface import ServedModel
from serving.layers.attention_half import AttentionHalf
from serving.layers.batch import BatchLayout
from serving.layers.ffn_half import FFNHalf
from serving.residency.staying import load_attention, load_ffn
from serving.spec import GQASpec, ModelSpec

ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 32, 64, 96, 128, 256)
DECODE_BATCHES = (1, 2, 4, 8, 16)
DECODE_CONTEXTS = (16, 64, 256, 1024, 4096)
# Close to each other where linear layers go over to another library, whose time jumps there (kernels/linear/cpu.py).
CHUNKS = (
    *((new, 0) for new in (16, 32, 64, 72, 96, 128, 256)),
    *((new, past) for past in (256, 1024) for new in (16, 64, 256)),
)
_UNCOUNTED_S = 0.04
_BESIDE_ROUNDS = 3
_MOST_ROWS_BETWEEN = 64  # of the FFN that runs untimed between two attention layers: they hit nearly all experts


@dataclass(frozen=True)
class Point:
    """One thing to time: which row it becomes, and a call that does it `repeats` times over (layers, usually) and returns the
    nanoseconds of it."""

    operator: str
    variant: str
    columns: dict[str, float]
    run: Callable[[], int]
    repeats: int


def measure(points: list[Point], rounds: int, seconds_per_point: float) -> tuple[list[MeasuredRow], float]:
    """Every point timed in each of `rounds` interleaved rounds, the mean of each; and the share of the time in which this thread
    did not run, which says how far to trust them.

    Times are of the thread's own clock: what other processes take of the core is not a cost of the model. What they take
    of caches and memory still shows.
    """
    times: list[list[float]] = [[] for _ in points]
    began_ns, own_began_ns = time.perf_counter_ns(), time.thread_time_ns()
    with torch.inference_mode():
        for _ in range(rounds):
            for mine, point in zip(times, points, strict=True):
                mine.append(_time(point, seconds_per_point))
    wall_ns, own_ns = time.perf_counter_ns() - began_ns, time.thread_time_ns() - own_began_ns
    rows = [
        MeasuredRow(point.operator, point.variant, point.columns, statistics.fmean(mine))
        for point, mine in zip(points, times, strict=True)
    ]
    return rows, max(0.0, 1.0 - own_ns / wall_ns)


def _time(point: Point, budget_s: float) -> float:
    """Mean seconds of one repeat over as many runs as fit into `budget_s`, at least one. Runs that do not count go before them:
    the first finds in the caches what another point left there, where an engine's step finds what the step before it left."""
    warm = time.perf_counter() + _UNCOUNTED_S * (budget_s > 0)
    point.run()
    while time.perf_counter() < warm:
        point.run()
    samples, end = [], time.perf_counter() + budget_s
    while not samples or (time.perf_counter() < end and len(samples) < 200):
        samples.append(point.run() * 1e-9 / point.repeats)
    return statistics.fmean(samples)


def _timed(call: Callable[[], object]) -> int:
    """Nanoseconds of this thread that `call` takes."""
    started = time.thread_time_ns()
    call()
    return time.thread_time_ns() - started


@contextmanager
def streaming(core: int) -> Iterator[Callable[[bool], None]]:
    """A process on `core` that streams memory while it is told True, and does nothing at first and while it is told False. Raises
    UserError where there can be none."""
    command = [sys.executable, "-m", "serving.cost", "stream", "--core", str(core), "--seconds", "3600"]
    streamer = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        if not streamer.stdout.readline():  # what it says once it streams
            raise UserError(f"the streaming process on core {core} ended with status {streamer.wait()}")
        streamer.send_signal(signal.SIGSTOP)
        yield lambda on: streamer.send_signal(signal.SIGCONT if on else signal.SIGSTOP)
    finally:
        streamer.kill()
        streamer.communicate()


def measure_beside_stream(
    points: list[Point], stream: Callable[[bool], None], seconds_per_point: float
) -> dict[str, float]:
    """By how much stages of decode steps slow while another core streams memory (`stream`, see :func:`streaming`): the median over
    a few sizes, by operator, each measured with and without it in turns, because the machine's own speed drifts."""
    chosen = [
        point
        for point in points
        if point.operator in ("stage_decode", "stage_routed")
        and point.columns.get("batch_size", 4) == 4
        and point.columns.get("num_tokens", 0) <= max(DECODE_BATCHES)
    ]
    ratios: dict[str, list[float]] = {}
    with torch.inference_mode():
        for point in chosen * _BESIDE_ROUNDS:
            alone = _time(point, seconds_per_point)
            stream(True)
            ratios.setdefault(point.operator, []).append(_time(point, seconds_per_point) / alone)
            stream(False)
    return {operator: max(1.0, statistics.median(values)) for operator, values in ratios.items()}


# -- stages of a model -------------------------------------------------------------------------------------------------
def load_halves(model: ServedModel) -> tuple[AttentionHalf, FFNHalf]:
    """Both halves of `model`, in this process's memory, as a worker has them in its own."""
    with open_weights(model) as weights:
        return load_attention(weights, model.dtype), load_ffn(weights, model.dtype)


def stage_points(
    model: ServedModel, attention: AttentionHalf, ffn: FFNHalf, kv_budget_bytes: int = 512 * 2**20, seed: int = 0
) -> Iterator[Point]:
    """All stages of a layer of `model`. Contexts that overflow the budget of KV are left out."""
    dtype = getattr(torch, model.dtype)
    generator = torch.Generator().manual_seed(seed)
    slots = min(
        model.spec.max_context_tokens * max(DECODE_BATCHES),
        kv_budget_bytes // model.spec.kv_bytes_per_token(model.dtype),
    )
    hidden = torch.randn(_MOST_ROWS_BETWEEN, model.spec.hidden_size, generator=generator).to(dtype)
    yield from _attention_points(
        model, attention, slots, generator, lambda layer, rows: ffn.forward(layer, hidden[:rows])
    )
    yield from _ffn_points(model, ffn, generator, _one_row(attention, hidden[:1], model))


def _attention_points(
    model: ServedModel,
    half: AttentionHalf,
    slots: int,
    generator: torch.Generator,
    between: Callable[[int, int], object],
) -> Iterator[Point]:
    spec, dtype = model.spec, getattr(torch, model.dtype)
    tail = _kv_tail(spec)
    caches = [torch.randn(slots, *tail, generator=generator).to(dtype) for _ in range(spec.num_layers)]

    def walk(query_lens: tuple[int, ...], kv_len: int) -> Callable[[], int]:
        starts = tuple(range(0, kv_len * len(query_lens), kv_len))
        rows = sum(query_lens)
        hidden = torch.randn(rows, spec.hidden_size, generator=generator).to(dtype)
        back = torch.zeros_like(hidden)

        def run() -> int:
            layout, total_ns = BatchLayout(query_lens, (kv_len,) * len(query_lens), starts, (rows - 1,)), 0
            for layer, cache in enumerate(caches):
                total_ns += _timed(lambda layer=layer, cache=cache: half.attend(layer, hidden, back, cache, layout))
                between(layer, rows)
            return total_ns

        return run

    common = {"hidden_size": float(spec.hidden_size)}
    for batch in DECODE_BATCHES:
        for context in DECODE_CONTEXTS:
            if batch * context <= slots and context <= spec.max_context_tokens:
                columns = {**common, "batch_size": float(batch), "context": float(context)}
                yield Point("stage_decode", spec.name, columns, walk((1,) * batch, context), spec.num_layers)
    for new, past in CHUNKS:
        if new + past <= min(slots, spec.max_context_tokens):
            columns = {**common, "isl": float(new), "past": float(past)}
            yield Point("stage_prefill", spec.name, columns, walk((new,), new + past), spec.num_layers)


def _kv_tail(spec: ModelSpec) -> tuple[int, ...]:
    """Shape of one token's KV in one layer."""
    shape = spec.attention
    return (2, shape.num_kv_heads, shape.head_dim) if isinstance(shape, GQASpec) else (shape.kv_elements_per_token,)


def _one_row(half: AttentionHalf, hidden: torch.Tensor, model: ServedModel) -> Callable[[int], object]:
    """One decoding row's attention in a layer."""
    cache, layout = torch.zeros(1, *_kv_tail(model.spec)).to(hidden.dtype), BatchLayout((1,), (1,), (0,), (0,))
    return lambda layer: half.attend(layer, hidden, torch.zeros_like(hidden), cache, layout)


def _ffn_points(
    model: ServedModel, half: FFNHalf, generator: torch.Generator, between: Callable[[int], object]
) -> Iterator[Point]:
    spec, dtype = model.spec, getattr(torch, model.dtype)
    kinds = {
        "stage_dense": [i for i in range(spec.num_layers) if spec.is_dense(i)],
        "stage_routed": [i for i in range(spec.num_layers) if not spec.is_dense(i)],
    }

    def walk(layers: list[int], rows: int) -> Callable[[], int]:
        # Fresh rows for each layer: the same ones would meet the same few experts' weights, warm. And all layers, timed or not:
        # the few dense ones among many routed would else find their own weights where they left them.
        inputs = torch.randn(spec.num_layers, rows, spec.hidden_size, generator=generator).to(dtype)

        def run() -> int:
            total_ns = 0
            for layer in range(spec.num_layers):
                between(layer)
                took_ns = _timed(lambda layer=layer: half.forward(layer, inputs[layer]))
                total_ns += took_ns if layer in layers else 0
            return total_ns

        return run

    for operator, layers in kinds.items():
        for rows in ROWS if layers else ():
            columns = {"hidden_size": float(spec.hidden_size), "rows": float(rows)}
            if operator == "stage_routed":
                columns = {
                    "hidden_size": float(spec.hidden_size),
                    "num_tokens": float(rows),
                    "distinct": spec.moe.distinct_experts(rows),
                }
            yield Point(operator, spec.name, columns, walk(layers, rows), len(layers))
