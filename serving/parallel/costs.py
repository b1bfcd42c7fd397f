"""What a step of a group costs each of its ranks, from stage costs. The simulated backend and the placement search ask here."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from serving.cost.contention import Load
from serving.cost.engine_kernels import step_kernels
from serving.cost.facts import Work
from serving.cost.hardware import DECODE, PROMPT
from serving.cost.operators import rounded
from serving.cost.stages import ModelStages, Stage
from serving.parallel.group import GroupPlan
from serving.spec import element_bytes


@dataclass(frozen=True)
class StepShape:
    """What one replica contributes to a step: decoding sequences with their tokens in all, and chunks of (new, past)."""

    batch: int = 0
    context_tokens: int = 0
    chunks: tuple[tuple[int, int], ...] = ()

    @functools.cached_property
    def rows(self) -> int:
        return self.batch + sum(new for new, _ in self.chunks)

    @classmethod
    def of(cls, query_lens: Sequence[int], kv_lens: Sequence[int]) -> StepShape:
        """Of sequences with so many rows in the step and so many tokens once it is done."""
        pairs = list(zip(query_lens, kv_lens, strict=True))
        decoding = [length for rows, length in pairs if rows == 1]
        chunks = tuple((rows, length - rows) for rows, length in pairs if rows > 1)
        return cls(len(decoding), sum(decoding), chunks)


class GroupCosts:
    """Seconds of the stages of a group's step on one rank. Attention is of one replica, the FFN of the rows of all.

    With data-parallel attention the FFN's rows are gathered first, at the cost of an exchange of half the message: an
    all-reduce is a gather and a scatter. A *pass* is one way of rows through the FFNs; here their number.
    """

    def __init__(self, stages: ModelStages, group: GroupPlan) -> None:
        self._stages, self._group = stages, group
        self._attention, self._ffn = stages.share(group.tp), stages.share(group.ranks)
        dense = stages.spec.dense_layers
        routed = [layer for layer in range(stages.spec.num_layers) if layer not in dense]
        self._alike = {layers[0]: len(layers) for layers in (dense, routed) if layers}  # one of a kind, and how many
        self._row_bytes = stages.spec.hidden_size * element_bytes(stages.dtype)
        self._loads: dict[tuple[tuple[int, int, tuple[tuple[int, int], ...]], ...], Load] = {}
        remember = functools.lru_cache(maxsize=None)
        self._attended, self.all_ffns = remember(self._attended), remember(self.all_ffns)
        self.embedding_s, self.head_s, self.ffn_s = (
            remember(one) for one in (self.embedding_s, self.head_s, self.ffn_s)
        )

    @property
    def spread(self) -> tuple[float, ...]:
        """By what steps that should be alike differ, alike in number; empty where they do not."""
        return self._stages.spread

    def embedding_s(self, rows: int) -> float:
        if not rows:
            return 0.0
        seconds = self._stages.launched_s(self._stages.embedding(rows))
        return seconds + self._stages.exchange_s(rows * self._row_bytes, self._group.tp)

    def attention_s(self, shape: StepShape) -> float:
        """One layer's attention of one replica, its sum over heads included."""
        if not shape.rows:
            return 0.0
        return self._attended(shape.batch, rounded(shape.context_tokens), shape.chunks).alone_s

    def _ffn_stage(self, layer: int, one_pass: Hashable) -> Stage:
        """One layer's FFN on one rank, the sum over all ranks included."""
        return self._ffn.ffn(layer, one_pass)

    def _gather_s(self, one_pass: Hashable) -> float:
        """Seconds until a rank has the rows of all replicas."""
        return self._stages.exchange_s(one_pass * self._row_bytes // 2, self._group.ranks)

    def _attended(self, batch: int, context_tokens: int, chunks: tuple[tuple[int, int], ...]) -> Load:
        stage = self._attention.mixed_attention(batch, context_tokens, chunks)
        return Load(self._attention.launched_s(stage), stage.work.bytes, stage.work.flops)

    def passes(self, shapes: Sequence[StepShape]) -> tuple[Hashable, ...]:
        """The passes of a step, of the rows of all replicas."""
        return self._stages.passes(
            sum(shape.batch for shape in shapes), [new for shape in shapes for new, _ in shape.chunks]
        )

    def all_ffns(self, passes: tuple[Hashable, ...]) -> Load:
        """The FFNs of all layers on one rank."""
        alike = [(self._ffn_stage(layer, each), count) for layer, count in self._alike.items() for each in passes]
        work = sum((stage.work.times(count) for stage, count in alike), Work())
        seconds = sum(count * self.ffn_s(layer, passes) for layer, count in self._alike.items())
        return Load(seconds, work.bytes, work.flops)

    def ffn_s(self, layer: int, passes: tuple[Hashable, ...]) -> float:
        """One layer's FFN of the rows of all replicas, each pass gathered and summed over all ranks."""
        return sum(self._pass_s(layer, each) for each in passes)

    def _pass_s(self, layer: int, one_pass: Hashable) -> float:
        gather_s = self._gather_s(one_pass) if self._group.dp > 1 else 0.0
        return gather_s + self._ffn.launched_s(self._ffn_stage(layer, one_pass))

    def head_s(self, wanted: int) -> float:
        return self._attention.launched_s(self._attention.head(wanted)) if wanted else 0.0

    def step_s(self, shapes: Sequence[StepShape]) -> float:
        """A whole step, `shapes` by replica: replicas wait for the slowest of them in every layer."""
        spec = self._stages.spec
        attention_s = max(self.attention_s(shape) for shape in shapes)
        ffns_s = self.all_ffns(self.passes(shapes)).alone_s
        ends_s = max(self.embedding_s(s.rows) + self.head_s(s.batch + len(s.chunks)) for s in shapes)
        return spec.num_layers * attention_s + ffns_s + ends_s

    def step_load(self, shapes: Sequence[StepShape]) -> Load:
        """What a whole step asks of a device of its busiest replica: seconds when nothing else runs there, bytes, FLOPs."""
        key = tuple((own.batch, rounded(own.context_tokens), own.chunks) for own in shapes)
        if key not in self._loads:
            self._loads[key] = self._load_of(shapes)
        return self._loads[key]

    def _load_of(self, shapes: Sequence[StepShape]) -> Load:
        layers, ffns = self._stages.spec.num_layers, self.all_ffns(self.passes(shapes))
        moved = computed = attention_s = 0.0
        for own in shapes:
            if own.rows:
                attention = self._attended(own.batch, rounded(own.context_tokens), own.chunks)
                moved, computed = max(moved, attention.bytes), max(computed, attention.flops)
                attention_s = max(attention_s, attention.alone_s)
        slowed = self._beside_stream(layers * attention_s, ffns.alone_s)
        bytes_moved, flops = ffns.bytes + layers * moved, ffns.flops + layers * computed
        kind = PROMPT if any(own.chunks for own in shapes) else DECODE
        kernels = max(  # without exchanges, which wait more than they compute
            (step_kernels(self._stages.spec, own.batch, [new for new, _ in own.chunks]) for own in shapes if own.rows),
            default=1,
        )
        return Load(self.step_s(shapes), bytes_moved, flops, slowed, kind, kernels)

    def _beside_stream(self, attention_s: float, ffns_s: float) -> float:
        """Slowdown beside a streaming core of a step with so much attention and FFN."""
        lost_s = attention_s * (self._stages.beside_stream("stage_decode") - 1.0)
        lost_s += ffns_s * (self._stages.beside_stream("stage_routed") - 1.0)
        return 1.0 + lost_s / (attention_s + ffns_s) if lost_s else 1.0

    def posted_bytes(self, rows: int, all_rows: int) -> int:
        """Bytes that a rank posts in one layer, of a step of `rows` rows in its replica."""
        group = self._group
        parts = (rows if group.tp > 1 else 0) + (rows if group.dp > 1 else 0) + (all_rows if group.ranks > 1 else 0)
        return parts * self._row_bytes
