"""What a step costs once, beside its layers: measured on the worker itself, served a script of requests in this process.

Composing a step, mapping pages, its layout and embedding, shapes that the product library meets for the first time, sampling,
reporting: none of it is a stage of a model, all of it is in every step. The worker's own timeline tells it apart from the layers.
What a layer takes there, and how much steps that should be alike differ, is measured too.
"""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from serving.batching import StepLimits
from serving.cost.calibrated import MeasuredRow
from serving.interface import ServedModel
from serving.layers.attention_half import AttentionHalf
from serving.layers.ffn_half import FFNHalf
from serving.memory.heap import keep_freed_memory
from serving.memory.kv_pool import KVGeometry, KVPool
from serving.shm.region import SharedRegion
from serving.spec import ModelSpec
from serving.workers import counters
from serving.workers.counters import Counters
from serving.workers.messages import Stop, Submit, Tokens, decode, encode
from serving.workers.model_worker import HostedModel, ModelWorker
from serving.workers.ports import LocalFFN
from serving.workers.timeline import A2F, ATTENTION, FINISH

DECODE_ROWS = (1, 2, 4, 8)
CHUNK_ROWS = (16, 32, 64, 80, 96, 128)
_PROMPT_TOKENS = 11  # of sequences that are to decode
_PAGE_BYTES = 65536
_LEAST_S = 1e-7  # what differences of measured times are at least
SPREAD_PARTS = 24


def rest_s(took_s: float, busy_share: float) -> float:
    """For how long to rest after `took_s` of work, to be busy for `busy_share` (at most 1) of the time."""
    return took_s * (1.0 / busy_share - 1.0)


class _Script:
    """Both rings of a worker at once: hands out the next batch of requests some time after the last has ended, and Stop in the
    end. The worker has something to do for `busy_share` of the time."""

    def __init__(self, batches: Sequence[Sequence[Submit]], busy_share: float) -> None:
        self._batches, self._ready, self._open = deque(batches), deque(), 0
        self._busy_share = busy_share
        self._began_s = self._next_s = time.monotonic()

    @property
    def empty(self) -> bool:
        return not self._ready if self._open else time.monotonic() < self._next_s

    def pop(self) -> bytes | None:
        if not self._open and not self.empty:
            self._ready.extend(self._batches.popleft() if self._batches else (Stop(),))
            self._open, self._began_s = len(self._ready), time.monotonic()
        return encode(self._ready.popleft()) if self._ready else None

    def wait(self, longest_s: float) -> None:
        if self.empty:
            time.sleep(min(longest_s, max(self._next_s - time.monotonic(), 0.0)))

    def push(self, data: bytes) -> bool:
        message = decode(data)
        if isinstance(message, Tokens):
            self._open -= sum(last for _, _, last in message.items)
            if self._batches:  # after the last there is nothing to rest for
                now_s = time.monotonic()
                self._next_s = now_s + rest_s(now_s - self._began_s, self._busy_share)
        return True


class _FFNApart(LocalFFN):
    """FFN in place, in a span of its own: the timeline tells attention from FFN where rows leave a device."""

    crosses = True


@dataclass(frozen=True)
class _Span:
    start_ns: int
    end_ns: int
    stage: int
    layer: int
    rows: int

    @property
    def ns(self) -> int:
        return self.end_ns - self.start_ns


class _Spans(list):
    """A recorder that keeps its spans at hand."""

    def add(self, start_ns: int, end_ns: int, stage: int, lane: int, model: int, layer: int, rows: int) -> None:
        self.append(_Span(start_ns, end_ns, stage, layer, rows))


@dataclass(frozen=True)
class WorkerSteps:
    """What a worker's steps took. `once`: rows of `stage_begin` (all that a step of so many rows does once, but for its end) and of
    `stage_end` (last residual, head, sampling and the report for so many positions of a decode step). `layers`: rows of the other
    stages, a layer's mean in decode steps and in prompts. `spread`: how much decode steps differ (:func:`spread`)."""

    once: list[MeasuredRow]
    layers: list[MeasuredRow]
    spread: tuple[float, ...]


def measure_steps(
    model: ServedModel,
    attention: AttentionHalf,
    ffn: FFNHalf,
    rounds: int,
    decode_steps: int = 16,
    busy_share: float = 1.0,
    lone_steps: int = 64,
) -> WorkerSteps:
    """Steps of a worker that is served a script of `rounds`, in each of which sequences decode for `decode_steps`, one that decodes
    alone for `lone_steps` (or as many as its context has room for), while it has something to do for `busy_share` of the time.
    What is done once is the median over all rounds, what layers take the mean.

    The first steps after a prompt may take longer than later ones; one row alone, which is what a device has most of at low load,
    is therefore measured over as many steps as a request has. Prompts have other lengths in each round: those of a real trace are
    seldom met twice.
    """
    spans, steps_of = _Spans(), dict.fromkeys(DECODE_ROWS, decode_steps)
    steps_of[1] = min(lone_steps, model.spec.max_context_tokens - _PROMPT_TOKENS - 1)
    _serve(model, attention, ffn, list(_batches(model, rounds, steps_of)), spans, busy_share)
    by_rows: dict[int, list[_Step]] = defaultdict(list)
    for step in _steps(spans):
        by_rows[step.rows].append(step)
    common = {"hidden_size": float(model.spec.hidden_size)}
    ends = {rows: statistics.median(step.end_ns for step in by_rows[rows]) for rows in DECODE_ROWS}
    once = [
        MeasuredRow("stage_end", model.name, {**common, "rows": float(rows)}, end_ns * 1e-9)
        for rows, end_ns in ends.items()
    ]
    layers = []
    for rows in (*DECODE_ROWS, *_chunk_rows(model)):
        chunk = rows not in ends
        lengths = _lengths(rows, rounds) if chunk else (rows,)
        end_ns = ends[1] if chunk else ends[rows]  # a chunk's end may take longer than a decode step's
        steps = [step for length in lengths for step in by_rows[length]]
        mean_rows = statistics.fmean(lengths)
        once_ns = statistics.median(step.once_ns - end_ns for step in steps)
        columns = {**common, "rows": mean_rows}
        once.append(MeasuredRow("stage_begin", model.name, columns, max(once_ns * 1e-9, _LEAST_S)))
        if chunk:
            operator, sizes = "stage_prefill", {"isl": mean_rows, "past": 0.0}
        else:
            context = _PROMPT_TOKENS + (steps_of[rows] + 1) / 2
            operator, sizes = "stage_decode", {"batch_size": mean_rows, "context": context}
        layers += _layers(model.spec, operator, {**common, **sizes}, mean_rows, steps)
    return WorkerSteps(once, layers, spread([[step.took_ns for step in by_rows[rows]] for rows in DECODE_ROWS]))


def _layers(
    spec: ModelSpec, operator: str, columns: dict[str, float], rows: float, steps: Sequence[_Step]
) -> Iterator[MeasuredRow]:
    """A layer's attention, and its FFN of either kind, in `steps` of `rows` rows."""

    def mean(name: str, columns: dict[str, float], times_ns: Iterable[float]) -> Iterator[MeasuredRow]:
        if found := list(times_ns):
            yield MeasuredRow(name, spec.name, columns, statistics.fmean(found) * 1e-9)

    ffn = {"hidden_size": columns["hidden_size"]}
    dense = [layer for layer in range(spec.num_layers) if spec.is_dense(layer)]
    routed = [layer for layer in range(spec.num_layers) if not spec.is_dense(layer)]
    yield from mean(operator, columns, (ns for step in steps for ns in step.attention_ns))
    yield from mean("stage_dense", {**ffn, "rows": rows}, (step.ffns_ns[layer] for step in steps for layer in dense))
    if routed:
        hit = {"num_tokens": rows, "distinct": spec.moe.distinct_experts(rows)}
        yield from mean("stage_routed", {**ffn, **hit}, (step.ffns_ns[layer] for step in steps for layer in routed))


def spread(groups: Sequence[Sequence[float]], parts: int = SPREAD_PARTS) -> tuple[float, ...]:
    """The distribution of times of each group over its mean, all groups together, cut into `parts` alike in number, ascending: the
    mean of each. They are 1 in the mean. Fewer where there are fewer times."""
    ratios = sorted(time / statistics.fmean(group) for group in groups for time in group)
    parts = min(parts, len(ratios))
    edges = [len(ratios) * part // parts for part in range(parts + 1)]
    means = [statistics.fmean(ratios[first:last]) for first, last in itertools.pairwise(edges)]
    mean = statistics.fmean(means)
    return tuple(value / mean for value in means)


def _chunk_rows(model: ServedModel) -> tuple[int, ...]:
    return tuple(rows for rows in CHUNK_ROWS if rows <= model.spec.max_context_tokens - 1)


def _lengths(rows: int, rounds: int) -> tuple[int, ...]:
    """A prompt length for each round."""
    return tuple(max(rows - number, max(DECODE_ROWS) + 1) for number in range(rounds))


def _batches(model: ServedModel, rounds: int, steps_of: Mapping[int, int]) -> Iterator[list[Submit]]:
    """One prompt at a time, each for one token; then as many sequences as decode together, for so many steps by their number."""
    numbers, generator = iter(range(1 << 30)), random.Random(0)

    def request(prompt_tokens: int, new_tokens: int) -> Submit:
        prompt = tuple(generator.choices(range(model.spec.vocab_size), k=prompt_tokens))
        return Submit(next(numbers), 0, prompt, new_tokens, ())

    longest = max(_chunk_rows(model))
    yield [request(min(longest + 1, model.spec.max_context_tokens - 1), 1)]  # what a process does but once
    for number in range(rounds):
        for rows in _chunk_rows(model):
            yield [request(_lengths(rows, rounds)[number], 1)]
        for batch in DECODE_ROWS:
            yield [request(_PROMPT_TOKENS, steps_of[batch] + 1) for _ in range(batch)]


def _serve(
    model: ServedModel,
    attention: AttentionHalf,
    ffn: FFNHalf,
    batches: Sequence[Sequence[Submit]],
    spans: _Spans,
    busy_share: float,
) -> None:
    """Run a worker of `model` through `batches`, one after the other."""
    most, spec = max(DECODE_ROWS), model.spec
    longest = max(len(request.prompt) + request.max_new_tokens for batch in batches for request in batch)
    pages = most * KVGeometry.of(spec, model.dtype).pages(longest, _PAGE_BYTES)
    pool, region = KVPool(pages, _PAGE_BYTES, [(spec, model.dtype)], most), SharedRegion(counters.REGION_BYTES)
    script, count = _Script(batches, busy_share), Counters(region)
    hosted = HostedModel(0, attention, pool.models[model.name], _FFNApart({0: ffn}, 1), 0, spec.num_layers)
    limits = StepLimits(most, max(longest, most * _PROMPT_TOKENS))
    keep_freed_memory()  # as a worker's process does
    try:
        ModelWorker([hosted], [("steps", pool)], limits, 1, script, script, count, 100.0, spans).run()
    finally:
        count.release()
        region.close()
        pool.close()


@dataclass(frozen=True)
class _Step:
    rows: int
    took_ns: int  # with the gap to the step before where it decodes
    once_ns: float  # all but the layers; gaps between spans are in it, and the gap to the step before
    end_ns: int
    attention_ns: tuple[
        int, ...
    ]  # of each layer but the first, which the begin is in; of the first where it is the only one
    ffns_ns: tuple[int, ...]  # of each layer


def _steps(spans: Sequence[_Span]) -> Iterator[_Step]:
    """The steps of a timeline, in order. What layer 0 takes longer than other layers' attention belongs to its begin; what
    others' spans vary by does not."""
    mine: list[_Span] = []
    before_ns = 0
    for span in spans:
        mine.append(span)
        if span.stage != FINISH:
            continue
        first, *others = [one.ns for one in mine if one.stage == ATTENTION]
        decodes = span.rows in DECODE_ROWS
        started_ns = before_ns if decodes and before_ns else mine[0].start_ns
        gaps_ns = span.end_ns - started_ns - sum(one.ns for one in mine)
        once_ns = gaps_ns + first - statistics.median(others or [first]) + span.ns
        ffns_ns = tuple(one.ns for one in mine if one.stage == A2F)
        yield _Step(span.rows, span.end_ns - started_ns, once_ns, span.ns, tuple(others or [first]), ffns_ns)
        before_ns, mine = span.end_ns, []
