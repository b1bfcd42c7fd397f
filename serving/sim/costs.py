"""Stage costs as the simulator asks for them: whole nanoseconds, remembered by what they depend on.

Integers make a run the same whether its events are taken one by one or many at once.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from serving.cost.operators import rounded
from serving.cost.stages import ModelStages, Stage


@dataclass(frozen=True, slots=True)
class Neighbourly:
    """How a stage gets along with others on memory that devices share (cores of one host): `beside` is its
    slowdown beside a neighbour that streams, `draws` the share of a core's bandwidth that it takes itself."""

    beside: float = 1.0
    draws: float = 0.0

    def mean(self, own_ns: int, other: Neighbourly, other_ns: int) -> Neighbourly:
        """Of two stages in a row."""
        part = own_ns / max(own_ns + other_ns, 1)
        return Neighbourly(part * self.beside + (1 - part) * other.beside, part * self.draws + (1 - part) * other.draws)


ALONE = Neighbourly()


def drawn_factor(spread: Sequence[float], generator: random.Random) -> float:
    """By how much one step is to differ from its like, one of `spread`; 1 where there is none."""
    return generator.choice(spread) if spread else 1


class StageTimes:
    """Nanoseconds of the stages of one model on one device."""

    def __init__(self, stages: ModelStages) -> None:
        self.stages, self.spread = stages, stages.spread
        self.attention_beside = self._neighbourly("stage_decode", stages.attention)
        last = stages.spec.num_layers - 1
        self.ffn_beside = self._neighbourly("stage_routed", lambda rows, _: stages.ffn(last, rows))
        # Whether a step takes what it takes, whoever else computes and whichever step it is.
        self.alone = self.attention_beside is ALONE and self.ffn_beside is ALONE and not self.spread
        self._attention = functools.lru_cache(maxsize=None)(self._attention_ns)
        self.ffn_ns = functools.lru_cache(maxsize=None)(self._ffn_ns)
        self.embedding_ns = functools.lru_cache(maxsize=None)(lambda rows: self._ns(stages.embedding(rows)))
        self.head_ns = functools.lru_cache(maxsize=None)(lambda rows: self._ns(stages.head(rows)) if rows else 0)
        self.sum_ns = functools.lru_cache(maxsize=None)(self._sum_ns)
        self.ffns_ns = functools.lru_cache(maxsize=None)(self._ffns_ns)

    def factor(self, generator: random.Random) -> float:
        """See :func:`drawn_factor`."""
        return drawn_factor(self.spread, generator)

    def attention_ns(self, query_lens: Sequence[int], kv_lens: Sequence[int]) -> int:
        """One attention layer of a step whose sequences have so many rows, and tokens once it is done."""
        batch = context = 0
        chunks = []
        for rows, length in zip(query_lens, kv_lens, strict=True):
            if rows == 1:
                batch += 1
                context += length
            else:
                chunks.append((rows, length - rows))
        return self._attention(batch, rounded(context) if batch else 0, tuple(chunks))

    def decode_attention_ns(self, batch: int, context_tokens: int) -> int:
        """The same of a step that decodes `batch` sequences with so many tokens in all once it is done."""
        return self._attention(batch, rounded(context_tokens), ())

    def passes(self, query_lens: Sequence[int]) -> tuple[int, ...]:
        """Rows of each pass that such a step makes through the FFNs."""
        chunk_rows = [rows for rows in query_lens if rows > 1]
        return self.stages.passes(len(query_lens) - len(chunk_rows), chunk_rows)

    def whole_ns(self, rows: int, passes: tuple[int, ...], wanted: int, attention_ns: int) -> int:
        """A step of `rows` rows, of which `wanted` get a token, on one device that does all of it: `attention_ns` a layer, and
        `passes` through the FFNs."""
        layers = self.stages.spec.num_layers
        return self.embedding_ns(rows) + layers * attention_ns + self.ffns_ns(passes) + self.head_ns(wanted)

    def whole_beside(self, passes: tuple[int, ...], attention_ns: int) -> Neighbourly:
        """How such a step gets along with others."""
        if self.attention_beside is ALONE and self.ffn_beside is ALONE:
            return ALONE
        layers = self.stages.spec.num_layers
        return self.attention_beside.mean(layers * attention_ns, self.ffn_beside, self.ffns_ns(passes))

    def _neighbourly(self, operator: str, stage_of: Callable[[int, int], Stage]) -> Neighbourly:
        hardware = self.stages.hardware
        bandwidth = hardware.memory_bandwidth
        beside = self.stages.beside_stream(operator)
        if beside <= 1.0:
            return ALONE
        stage = stage_of(1, 64)
        return Neighbourly(beside, min(1.0, stage.work.bytes / (stage.device_s * bandwidth)))

    def _attention_ns(self, batch: int, context: int, chunks: tuple[tuple[int, int], ...]) -> int:
        return self._ns(self.stages.mixed_attention(batch, context, chunks))

    def _ffn_ns(self, layer: int, passes: tuple[int, ...]) -> int:
        return sum(self._ns(self.stages.ffn(layer, rows)) for rows in passes)

    def _ffns_ns(self, passes: tuple[int, ...]) -> int:
        """The FFNs of all layers."""
        return sum(self.ffn_ns(layer, passes) for layer in range(self.stages.spec.num_layers))

    def _sum_ns(self, rows: int, parts: int) -> int:
        return self._ns(self.stages.partial_sum(rows, parts)) if parts > 1 else 0

    def _ns(self, stage: Stage) -> int:
        return round(self.stages.launched_s(stage) * 1e9)
