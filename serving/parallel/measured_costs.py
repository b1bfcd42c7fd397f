"""What a step of a group costs on a card where one rank's share of such steps was measured (:mod:`serving.parallel.group_steps`).

Replicas step together, in parts whose shape is that of the largest of them (serving/cuda/groups); every exchange between ranks
takes what one of that many cards was measured to take, sums and gathers alike. The host starts rank after rank: all wait for
the last one's first exchange.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import zip_longest
from typing import NamedTuple

from serving.cost import facts
from serving.cost.calibrated import Calibration
from serving.cost.measured_card import CardStages, LayersAlone, graph_rows
from serving.cost.stages import ModelStages, Stage
from serving.errors import UserError
from serving.parallel.costs import GroupCosts, StepShape
from serving.parallel.group import GroupPlan
from serving.parallel.share import share_spec
from serving.spec import ModelSpec, element_bytes

EXCHANGE = "exchange"  # variant of the operator `collective`
_PAIR_BYTES = 8  # a logit and a token, float32


def variant_of(model: str, tp: int, dp: int) -> str:
    """Under which name a rank's stages are kept."""
    return f"{model}/tp{tp}xdp{dp}"


class Pass(NamedTuple):
    """One way of rows through the FFNs: `rows` of all replicas together, of which so many are `differing`; the others are idle and
    repeat one of them, but where there is one replica, whose idle rows are like any other."""

    rows: int
    differing: int


def passes_of(shapes: Sequence[StepShape]) -> tuple[Pass, ...]:
    """The passes of a step of `shapes`, by replica: decode rows and the first prompt of each, the second of each..."""
    replicas = len(shapes)
    by_replica = []
    for shape in shapes:
        first, *others = [new for new, _ in shape.chunks] or [0]
        by_replica.append([(shape.batch, first), *((0, new) for new in others)])
    made = []
    for parts in zip_longest(*by_replica, fillvalue=(0, 0)):
        decode, chunk = (max(counts) for counts in zip(*parts, strict=True))
        own = (graph_rows(decode, chunk=False) if decode else 0) + (graph_rows(chunk, chunk=True) if chunk else 0)
        made.append(Pass(replicas * own, sum(map(sum, parts)) if replicas > 1 else own))
    return tuple(made)


class RankStages(LayersAlone):
    """Stages of one rank of a group of `spec` cut as `plan` says, each with the sum over ranks that ends it, unless `exchanges` take
    no time. Raises UserError where its steps were not measured, or no exchange between as many cards."""

    def __init__(self, spec: ModelSpec, plan: GroupPlan, found: Calibration, exchanges: bool = True) -> None:
        name = variant_of(spec.name, plan.tp, plan.dp)
        known = [variant for variant in found.models() if variant != EXCHANGE]
        card = found.hardware.name
        if name not in known:
            raise UserError(
                f"steps of {spec.name} over tp{plan.tp} x dp{plan.dp} were not measured on {card} (measured: {', '.join(known)}); "
                f"backend.card={card} has costs of other kernels"
            )
        exchanging = {int(cards) for cards in found.rows["collective"].columns["num_gpus"]}
        for cards in sorted({plan.tp, plan.dp, plan.ranks} - {1}):
            if exchanges and cards not in exchanging:
                raise UserError(f"{spec.name}: exchanges between {cards} cards were not measured on {card}")
        share = share_spec(spec, plan.share(0))
        super().__init__(dataclasses.replace(share, name=name), found)
        self._plan, self._exchanges, self._row_bytes = plan, exchanges, spec.hidden_size * element_bytes(found.dtype)

    def share(self, parts: int) -> ModelStages:
        """They are of one rank already."""
        return self

    def exchange_s(self, message_bytes: int, ranks: int) -> float:
        if ranks == 1 or not self._exchanges:
            return 0.0
        columns = {"num_gpus": float(ranks), "message_size": float(message_bytes)}
        return self._seconds_of("collective", EXCHANGE, columns)

    def launch_s(self, rows: int) -> float:
        """What the host takes to start a part of `rows` rows on one rank's card."""
        return self._seconds("stage_begin", rows=rows)

    def ffn_pass(self, layer: int, one_pass: Pass) -> Stage:
        """One FFN layer, and the sum over all ranks."""
        distinct = self.spec.moe.distinct_experts(one_pass.differing)
        if self.spec.is_dense(layer):
            seconds = self._seconds("stage_dense", rows=one_pass.rows)
        else:
            seconds = self._seconds("stage_routed", num_tokens=one_pass.rows, distinct=distinct)
        work = facts.ffn_work(self.spec, layer, one_pass.rows, self.dtype, distinct=distinct)
        return self._exchanged(Stage(seconds, work, 1), one_pass.rows // self._plan.dp, self._plan.ranks)

    def gather_s(self, one_pass: Pass) -> float:
        rows = one_pass.rows // self._plan.dp
        return self.exchange_s(rows * self._row_bytes, self._plan.dp)

    def step_s(self, shapes: Sequence[StepShape]) -> float:
        """What a step of `shapes`, by replica, takes rank 0, gathering not in it."""
        own, layers = shapes[0], range(self.spec.num_layers)
        attention = self.mixed_attention(own.batch, own.context_tokens, own.chunks).times(len(layers))
        ffns = (self.ffn_pass(layer, each) for layer in layers for each in passes_of(shapes))
        return sum((stage.device_s for stage in ffns), attention.device_s)

    def _decode_attention_layer(self, batch: int, context_tokens: int) -> Stage:
        stage = super()._decode_attention_layer(batch, context_tokens)
        return self._exchanged(stage, graph_rows(batch, chunk=False), self._plan.tp)

    def _prefill_attention_layer(self, new_tokens: int, past_tokens: int) -> Stage:
        stage = super()._prefill_attention_layer(new_tokens, past_tokens)
        return self._exchanged(stage, graph_rows(new_tokens, chunk=True), self._plan.tp)

    def _exchanged(self, stage: Stage, rows: int, ranks: int) -> Stage:
        return Stage(stage.device_s + self.exchange_s(rows * self._row_bytes, ranks), stage.work, stage.kernels)


class MeasuredGroupCosts(GroupCosts):
    """The same as :class:`serving.parallel.costs.GroupCosts` of a group whose rank was measured."""

    def __init__(self, rank: RankStages, group: GroupPlan) -> None:
        self._rank = rank
        super().__init__(rank, group)

    def passes(self, shapes: Sequence[StepShape]) -> tuple[Pass, ...]:
        return passes_of(shapes)

    def embedding_s(self, rows: int) -> float:
        """With the start of the other ranks."""
        if not rows:
            return 0.0
        return super().embedding_s(rows) + (self._group.ranks - 1) * self._rank.launch_s(rows)

    def head_s(self, wanted: int) -> float:
        return super().head_s(wanted) + self._rank.exchange_s(wanted * _PAIR_BYTES, self._group.tp) if wanted else 0.0

    def _ffn_stage(self, layer: int, one_pass: Pass) -> Stage:
        return self._rank.ffn_pass(layer, one_pass)

    def _gather_s(self, one_pass: Pass) -> float:
        return self._rank.gather_s(one_pass)


def group_costs(stages: ModelStages, group: GroupPlan) -> GroupCosts:
    """What steps of `group` cost by `stages` of the whole model: as measured of one rank where those are measured too. Raises
    UserError where this group was not."""
    if group.ranks == 1 or not isinstance(stages, CardStages) or stages.of_ranks is None:
        return GroupCosts(stages, group)
    return MeasuredGroupCosts(RankStages(stages.spec, group, stages.of_ranks), group)
