"""Stage costs where nothing was fitted or measured: work divided by what the hardware can move and compute.

Good enough to compare placements with each other and to search settings, never shown as a prediction. :class:`SharedStages`
is the same idea for shares of measured stages: a share takes the whole's seconds by its part of the work.
"""

from __future__ import annotations

from collections.abc import Sequence

from serving.cost import facts
from serving.cost.facts import Work
from serving.cost.hardware import Hardware
from serving.cost.stages import ModelStages, Stage
from serving.cost.transfers import shared_memory_exchange_s
from serving.spec import ModelSpec, element_bytes

_ATTENTION_KERNELS, _ROUTED_KERNELS, _DENSE_KERNELS, _HEAD_KERNELS = 7, 6, 3, 3


class RooflineStages(ModelStages):
    """The larger of memory and compute time of each stage, plus its launches, on one of `parts` devices."""

    def __init__(self, spec: ModelSpec, dtype: str, hardware: Hardware, parts: int = 1):
        super().__init__(spec, dtype, hardware)
        self._parts = parts

    def share(self, parts: int) -> RooflineStages:
        return RooflineStages(self.spec, self.dtype, self.hardware, self._parts * parts)

    def exchange_s(self, message_bytes: int, ranks: int) -> float:
        return shared_memory_exchange_s(self.hardware, message_bytes, ranks)

    def launched_s(self, stage: Stage) -> float:
        return stage.device_s + stage.kernels * self.hardware.launch_graph_s

    def head(self, rows: int) -> Stage:
        work = facts.head_work(self.spec, rows, self.dtype, self._parts)
        return self._stage(work + facts.sampling_work(self.spec, rows, self.dtype), _HEAD_KERNELS)

    def embedding(self, tokens: int) -> Stage:
        return self._stage(facts.embedding_work(self.spec, tokens, self.dtype), 1)

    def _decode_attention_layer(self, batch: int, context_tokens: int) -> Stage:
        core = facts.decode_core_work(self.spec, batch, context_tokens, self.dtype, self._parts)
        projections = facts.projection_work(self.spec, batch, self.dtype, self._parts)
        return self._summed(self._stage(core + projections, _ATTENTION_KERNELS), batch)

    def _prefill_attention_layer(self, new_tokens: int, past_tokens: int) -> Stage:
        core = facts.prefill_core_work(self.spec, new_tokens, past_tokens, self.dtype, self._parts)
        projections = facts.projection_work(self.spec, new_tokens, self.dtype, self._parts, absorbed=False)
        return self._summed(self._stage(core + projections, _ATTENTION_KERNELS), new_tokens)

    def _ffn_layer(self, layer: int, tokens: int) -> Stage:
        kernels = _DENSE_KERNELS if self.spec.is_dense(layer) else _ROUTED_KERNELS
        work = facts.ffn_work(self.spec, layer, tokens, self.dtype, self._parts)
        return self._summed(self._stage(work, kernels), tokens)

    def _stage(self, work: Work, kernels: int) -> Stage:
        hardware = self.hardware
        return Stage(
            max(work.bytes / hardware.memory_bandwidth, work.flops / hardware.flops(self.dtype)), work, kernels
        )

    def _summed(self, stage: Stage, rows: int) -> Stage:
        message = rows * self.spec.hidden_size * element_bytes(self.dtype)
        return stage + Stage(self.exchange_s(message, self._parts), Work(), 0)


class SharedStages(ModelStages):
    """One of `parts` shares of `whole`: its seconds times the part of its bytes, or FLOPs, that the share has (the larger)."""

    def __init__(self, whole: ModelStages, parts: int):
        super().__init__(whole.spec, whole.dtype, whole.hardware)
        self._whole, self._parts = whole, parts

    def passes(self, batch: int, chunk_rows: Sequence[int]) -> tuple[int, ...]:
        return self._whole.passes(batch, chunk_rows)

    def share(self, parts: int) -> SharedStages:
        return SharedStages(self._whole, self._parts * parts)

    def exchange_s(self, message_bytes: int, ranks: int) -> float:
        return self._whole.exchange_s(message_bytes, ranks)

    def launched_s(self, stage: Stage) -> float:
        return self._whole.launched_s(stage)

    def head(self, rows: int) -> Stage:
        return self._cut(self._whole.head(rows), lambda tp: facts.head_work(self.spec, rows, self.dtype, tp))

    def embedding(self, tokens: int) -> Stage:
        return self._whole.embedding(tokens)

    def _decode_attention_layer(self, batch: int, context_tokens: int) -> Stage:
        def work(tp: int) -> Work:
            core = facts.decode_core_work(self.spec, batch, context_tokens, self.dtype, tp)
            return core + facts.projection_work(self.spec, batch, self.dtype, tp)

        return self._cut(self._whole.attention(batch, context_tokens), work, batch)

    def _prefill_attention_layer(self, new_tokens: int, past_tokens: int) -> Stage:
        def work(tp: int) -> Work:
            core = facts.prefill_core_work(self.spec, new_tokens, past_tokens, self.dtype, tp)
            return core + facts.projection_work(self.spec, new_tokens, self.dtype, tp)

        return self._cut(self._whole.prefill_attention(new_tokens, past_tokens), work, new_tokens)

    def _ffn_layer(self, layer: int, tokens: int) -> Stage:
        whole = self._whole.ffn(layer, tokens)
        return self._cut(whole, lambda tp: facts.ffn_work(self.spec, layer, tokens, self.dtype, tp), tokens)

    def _cut(self, whole: Stage, work, rows: int = 0) -> Stage:
        cut, full = work(self._parts), work(1)
        part = max(cut.bytes / full.bytes, cut.flops / full.flops)
        message = rows * self.spec.hidden_size * element_bytes(self.dtype)
        exchange_s = self.exchange_s(message, self._parts) if rows else 0.0
        return Stage(whole.device_s * part + exchange_s, cut, whole.kernels)
