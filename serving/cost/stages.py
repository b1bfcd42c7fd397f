"""What a model's stages cost on a card: attention, FFN, head of one batch, as kernels in a row, with their work.

A stage is what runs on one device between two hand-offs. Costs are of one layer on one of `tp` devices, all-reduce
included where tensor parallelism needs one.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from serving.cost import facts
from serving.cost.contention import Load
from serving.cost.facts import Work
from serving.cost.hardware import Hardware
from serving.cost.operators import PASSES, CostModel, rounded
from serving.cost.routing import distinct_experts
from serving.cost.transfers import launched_s
from serving.spec import GQASpec, ModelSpec, element_bytes


@dataclass(frozen=True)
class Stage:
    """One stage: seconds on the device alone, the work behind them, and how many kernels it launches."""

    device_s: float
    work: Work
    kernels: int

    def load(self) -> Load:
        """The stage as contention sees it."""
        return Load(self.device_s, self.work.bytes, self.work.flops)

    def __add__(self, other: Stage) -> Stage:
        return Stage(self.device_s + other.device_s, self.work + other.work, self.kernels + other.kernels)

    def times(self, count: int) -> Stage:
        """`count` such stages in a row."""
        return Stage(count * self.device_s, self.work.times(count), count * self.kernels)


NOTHING = Stage(0.0, Work(), 0)


class ModelStages:
    """What every source of stage costs shares: rounding, remembering, and summing layers up to steps.

    A subclass says what one attention layer, one FFN layer, the head and the embedding cost. `context_tokens` is always
    the sum over the batch, and is rounded to 1 %.
    """

    def __init__(self, spec: ModelSpec, dtype: str, hardware: Hardware):
        self.spec, self.dtype, self.hardware = spec, dtype, hardware
        self._attention = functools.lru_cache(maxsize=None)(self._decode_attention_layer)
        self._prefill = functools.lru_cache(maxsize=None)(self._prefill_attention_layer)
        self._ffn = functools.lru_cache(maxsize=None)(self._ffn_layer)
        self._step = functools.lru_cache(maxsize=None)(self._decode_step)

    # -- what a subclass provides --------------------------------------------------------------------------------------
    def head(self, rows: int) -> Stage:
        """Last norm, LM head and greedy sampling of `rows` positions."""
        raise NotImplementedError

    def embedding(self, tokens: int) -> Stage:
        """Look-up of `tokens` rows."""
        raise NotImplementedError

    def partial_sum(self, rows: int, parts: int) -> Stage:
        """Adding up what `parts` devices computed of `rows` rows."""
        raise NotImplementedError

    def launched_s(self, stage: Stage) -> float:
        """Seconds of a stage with its launches."""
        raise NotImplementedError

    def beside_stream(self, operator: str) -> float:
        """Slowdown of a stage (`stage_decode`, `stage_routed`) while a neighbour streams the memory that both draw on."""
        return 1.0

    @property
    def spread(self) -> tuple[float, ...]:
        """How much steps that should be alike differ: factors, each as likely as the others, 1 in the mean. Empty: not at all."""
        return ()

    def share(self, parts: int) -> ModelStages:
        """The stages of one of `parts` devices that share out heads, widths and vocabulary, each with the sum over all of
        them that ends it."""
        raise NotImplementedError

    def exchange_s(self, message_bytes: int, ranks: int) -> float:
        """Seconds until `ranks` devices have each other's share of a message, or its sum."""
        raise NotImplementedError

    def _decode_attention_layer(self, batch: int, context_tokens: int) -> Stage:
        raise NotImplementedError

    def _prefill_attention_layer(self, new_tokens: int, past_tokens: int) -> Stage:
        raise NotImplementedError

    def _ffn_layer(self, layer: int, tokens: int) -> Stage:
        raise NotImplementedError

    # -- what follows --------------------------------------------------------------------------------------------------
    def attention(self, batch: int, context_tokens: float) -> Stage:
        """One attention layer at decode: norm, projections, core, output."""
        return self._attention(batch, rounded(context_tokens))

    def prefill_attention(self, new_tokens: int, past_tokens: int = 0) -> Stage:
        """One attention layer for a chunk of one sequence."""
        return self._prefill(new_tokens, rounded(past_tokens) if past_tokens else 0)

    def mixed_attention(self, batch: int, context_tokens: float, chunks: Sequence[tuple[int, int]]) -> Stage:
        """One attention layer of a step that decodes `batch` sequences and prefills `chunks` of (new, past) tokens.

        Their sum, with what each of them would do once (weights, launches: a step of one short sequence) done once a pass.
        """
        several = [self.prefill_attention(new, past) for new, past in chunks]
        if batch:
            several.append(self.attention(batch, context_tokens))
        if not several:
            return NOTHING
        passes = len(self.passes(batch, [new for new, _ in chunks]))
        return sum(several, NOTHING) + self.attention(1, 1).times(passes - len(several))

    def passes(self, batch: int, chunk_rows: Sequence[int]) -> tuple[int, ...]:
        """Rows of each pass through a layer of a step that decodes `batch` sequences and prefills chunks of so many rows."""
        return (batch + sum(chunk_rows),)

    def ffn(self, layer: int, tokens: int) -> Stage:
        """One FFN layer: dense, or router, routed experts and shared expert."""
        return self._ffn(self._alike(layer), tokens)

    def decode_step(self, batch: int, context_tokens: float) -> Stage:
        """A whole decode step on one device (or `tp` of them): the baselines' step, and the sum of CrossPool's stages."""
        return self._step(batch, rounded(context_tokens))

    def prefill_step(self, new_tokens: int, past_tokens: int = 0) -> Stage:
        """A whole chunk of one sequence through all layers; the head for its last position."""
        return self.mixed_step(0, 0, [(new_tokens, past_tokens)])

    def mixed_step(self, batch: int, context_tokens: float, chunks: Sequence[tuple[int, int]]) -> Stage:
        """A whole step on one device that decodes `batch` sequences and prefills `chunks` of (new, past) tokens to their ends."""
        attention = self.mixed_attention(batch, context_tokens, chunks).times(self.spec.num_layers)
        new_rows = [new for new, _ in chunks]
        ffns = sum((self._all_ffns(rows) for rows in self.passes(batch, new_rows)), NOTHING)
        return self.embedding(batch + sum(new_rows)) + attention + ffns + self.head(batch + len(chunks))

    def _decode_step(self, batch: int, context_tokens: int) -> Stage:
        return self.mixed_step(batch, context_tokens, ())

    def _alike(self, layer: int) -> int:
        """The first layer whose FFN has the same shape as `layer`'s, so that alike layers are costed once."""
        kind = self.spec.is_dense(layer)
        return next(i for i in range(self.spec.num_layers) if self.spec.is_dense(i) == kind)

    def _all_ffns(self, tokens: int) -> Stage:
        """The FFNs of all layers."""
        counts = Counter(self._alike(layer) for layer in range(self.spec.num_layers))
        return sum((self.ffn(layer, tokens).times(count) for layer, count in counts.items()), NOTHING)


class StageCosts(ModelStages):
    """Stages of one model on one card, from operator costs. `distribution` is how its router spreads tokens over experts.

    Pools may be cut differently: take attention from one of these and FFNs from another with its own `tp`. Attention
    raises :class:`UserError` when the heads cannot be cut into `tp` parts.
    """

    def __init__(self, spec: ModelSpec, cost: CostModel, tp: int = 1, distribution: str = "uniform"):
        super().__init__(spec, cost.dtype, cost.hardware)
        self.cost, self.tp, self.distribution = cost, tp, distribution
        self.heads = spec.attention.num_heads // tp

    def share(self, parts: int) -> StageCosts:
        return StageCosts(self.spec, self.cost, self.tp * parts, self.distribution)

    def exchange_s(self, message_bytes: int, ranks: int) -> float:
        return self.cost.all_reduce_s(message_bytes, ranks)

    # -- decode --------------------------------------------------------------------------------------------------------
    def _decode_attention_layer(self, batch: int, context_tokens: int) -> Stage:
        return self._attention_layer(batch, self._decode_core(batch, context_tokens), absorbed=True)

    def _prefill_attention_layer(self, new_tokens: int, past_tokens: int) -> Stage:
        return self._attention_layer(new_tokens, self._prefill_core(new_tokens, past_tokens), absorbed=False)

    def _ffn_layer(self, layer: int, tokens: int) -> Stage:
        spec, hidden = self.spec, self.spec.hidden_size
        work = facts.ffn_work(spec, layer, tokens, self.dtype, self.tp, self._distinct(tokens))
        if spec.is_dense(layer):
            seconds, kernels = self._gated(tokens, spec.dense_width), 3
        else:
            moe = spec.moe
            seconds = self.cost.gemm_s(tokens, moe.num_experts, hidden)
            seconds += self.cost.elementwise_s("route", tokens, moe.num_experts)
            seconds += self.cost.moe_s(
                tokens, hidden, moe.expert_width / self.tp, moe.top_k, moe.num_experts, self.distribution
            )
            kernels = 5
            if moe.shared_width:
                seconds, kernels = seconds + self._gated(tokens, moe.shared_width), kernels + 3
        return self._reduced(Stage(seconds, work, kernels), tokens)

    def head(self, rows: int) -> Stage:
        """Last norm, LM head and greedy sampling of `rows` positions."""
        spec = self.spec
        width = -(-spec.vocab_size // self.tp)
        seconds = self.cost.elementwise_s("norm", rows, spec.hidden_size)
        seconds += self.cost.gemm_s(rows, width, spec.hidden_size) + self.cost.elementwise_s("sample", rows, width)
        work = facts.head_work(spec, rows, self.dtype, self.tp) + facts.sampling_work(spec, rows, self.dtype)
        return Stage(seconds, work, 3)

    def embedding(self, tokens: int) -> Stage:
        """Look-up of `tokens` rows."""
        work = facts.embedding_work(self.spec, tokens, self.dtype)
        return Stage(self.cost.elementwise_s("embed", tokens, self.spec.hidden_size), work, 1)

    def partial_sum(self, rows: int, parts: int) -> Stage:
        """One fused pass that reads all parts and writes their sum."""
        elements = (parts + 1) * rows * self.spec.hidden_size
        work = Work((parts - 1) * rows * self.spec.hidden_size, activation_bytes=elements * element_bytes(self.dtype))
        seconds = self.cost.elementwise_s(
            "activation", rows, (parts + 1) * self.spec.hidden_size / PASSES["activation"]
        )
        return Stage(seconds, work, 1)

    # -- shared --------------------------------------------------------------------------------------------------------
    def launched_s(self, stage: Stage) -> float:
        """Seconds of a stage with its launches, captured in a graph or not as the cost model says."""
        return launched_s(self.hardware, stage.device_s, stage.kernels, self.cost.graph)

    def _attention_layer(self, rows: int, core: Stage, absorbed: bool) -> Stage:
        shapes = facts.projection_shapes(self.spec, self.tp, absorbed)
        seconds = sum(self.cost.gemm_s(rows, outputs, inputs) for inputs, outputs in shapes)
        seconds += 2 * self.cost.elementwise_s("norm", rows, self.spec.hidden_size) + self._rope_s(rows)
        work = facts.projection_work(self.spec, rows, self.dtype, self.tp, absorbed)
        work += facts.norm_work(rows, self.spec.hidden_size, self.dtype).times(2)
        return self._reduced(Stage(seconds, work, len(shapes) + 3) + core, rows)

    def _rope_s(self, rows: int) -> float:
        """Rotation, KV write and (where there is one) q/k norm, fused into one pass over the new queries and keys."""
        attention = self.spec.attention
        width = self.heads * (attention.head_dim if isinstance(attention, GQASpec) else attention.rope_dim)
        return self.cost.elementwise_s("rope", rows, width + attention.kv_elements_per_token)

    def _decode_core(self, batch: int, context_tokens: float) -> Stage:
        attention, mean = self.spec.attention, context_tokens / batch
        if isinstance(attention, GQASpec):
            kv_heads = max(1, attention.num_kv_heads // self.tp)
            seconds = self.cost.decode_attention_s(batch, mean, self.heads, kv_heads, attention.head_dim)
        else:
            seconds = self.cost.decode_mla_s(batch, mean, self.heads, attention.kv_rank, attention.rope_dim)
        return Stage(seconds, facts.decode_core_work(self.spec, batch, context_tokens, self.dtype, self.tp), 1)

    def _prefill_core(self, new_tokens: int, past_tokens: int) -> Stage:
        """A chunk after a prefix costs what the whole prompt costs less what the prefix alone does (at least its KV)."""
        whole = self._prompt_core_s(new_tokens + past_tokens)
        seconds = whole - self._prompt_core_s(past_tokens) if past_tokens else whole
        work = facts.prefill_core_work(self.spec, new_tokens, past_tokens, self.dtype, self.tp)
        floor = work.bytes / self.cost.hardware.memory_bandwidth
        return Stage(max(seconds, floor), work, 1)

    def _prompt_core_s(self, tokens: int) -> float:
        attention = self.spec.attention
        if isinstance(attention, GQASpec):
            kv_heads = max(1, attention.num_kv_heads // self.tp)
            return self.cost.prefill_attention_s(1, tokens, self.heads, kv_heads, attention.head_dim)
        return self.cost.prefill_mla_s(1, tokens, self.heads, attention.qk_dim, attention.value_dim, attention.kv_rank)

    def _gated(self, tokens: int, width: int) -> float:
        """A gated FFN as two products (gate and up joined) and the activation between them."""
        own, hidden = -(-width // self.tp), self.spec.hidden_size
        gate_up, down = self.cost.gemm_s(tokens, 2 * own, hidden), self.cost.gemm_s(tokens, hidden, own)
        return gate_up + down + self.cost.elementwise_s("activation", tokens, own)

    def _distinct(self, tokens: int) -> float:
        return distinct_experts(tokens, self.spec.moe.num_experts, self.spec.moe.top_k, self.distribution)

    def _reduced(self, stage: Stage, rows: int) -> Stage:
        """With the all-reduce that ends a tensor-parallel stage."""
        if self.tp == 1:
            return stage
        message = facts.crossing_bytes(self.spec, rows, self.dtype)
        return stage + Stage(self.cost.all_reduce_s(message, self.tp), Work(), 1)
