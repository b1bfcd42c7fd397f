"""Costs of this project's own engine on a card, where its steps were measured there (:mod:`serving.cost.card_steps`).

Shipped calibrations are cards of their own to whoever simulates: `h200-measured` is `h200` with what our kernels and graphs take
on it. They know the models that were measured, under whatever name these are served.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

from serving.cost import facts
from serving.cost.calibrated import CalibratedStages, Calibration, read_calibration
from serving.cost.stages import ModelStages, Stage
from serving.cost.table1 import published_spec
from serving.errors import UserError
from serving.part_shapes import chunk_sizes, decode_sizes
from serving.spec import ModelSpec

MEASURED_DIRECTORY = Path(__file__).resolve().parent / "measured"
SUFFIX = "-measured"
_MOST_ROWS = 1 << 20


def graph_rows(rows: int, chunk: bool) -> int:
    """Rows of the smallest graph that holds `rows` rows of a prompt (`chunk`), or as many sequences that decode; what is left over
    is computed and dropped."""
    return next(size for size in (chunk_sizes if chunk else decode_sizes)(_MOST_ROWS) if size >= rows)


class InParts(ModelStages):
    """A step as this project's engine runs it on a card (:mod:`serving.part_shapes`): decode rows with the first prompt's, each
    other prompt's alone, each part with a pass of its own through the layers. Mixed into stages that say what these cost."""

    def passes(self, batch: int, chunk_rows: Sequence[int]) -> tuple[int, ...]:
        if not chunk_rows:
            return (graph_rows(batch, chunk=False),)
        first, *others = (graph_rows(rows, chunk=True) for rows in chunk_rows)
        return (batch + first, *others)

    def _prefill_attention_layer(self, new_tokens: int, past_tokens: int) -> Stage:
        return super()._prefill_attention_layer(graph_rows(new_tokens, chunk=True), past_tokens)


class LayersAlone(InParts, CalibratedStages):
    """Measured stages of layers that hold their share of all that is done once a part (embedding, head, launches)."""

    def head(self, rows: int) -> Stage:
        return Stage(0.0, facts.head_work(self.spec, rows, self.dtype), 0)

    def embedding(self, tokens: int) -> Stage:
        return Stage(0.0, facts.embedding_work(self.spec, tokens, self.dtype), 0)

    def mixed_attention(self, batch: int, context_tokens: float, chunks: Sequence[tuple[int, int]]) -> Stage:
        """With what decode rows were measured to add to a chunk's, where they were."""
        if not batch or not chunks or not self.measured("stage_beside"):
            return super().mixed_attention(batch, context_tokens, chunks)
        core = facts.decode_core_work(self.spec, batch, context_tokens, self.dtype)
        added = Stage(self._seconds("stage_beside", batch_size=batch, context=context_tokens / batch), core, 1)
        return sum((self.prefill_attention(new, past) for new, past in chunks), added)


class CardStages(LayersAlone):
    """Stages of one model as they were measured of this project's engine on a card. Raises UserError for a model that was not
    measured, whatever it is called. `of_ranks` holds what ranks of groups take (:mod:`serving.parallel.measured_costs`)."""

    def __init__(self, spec: ModelSpec, found: Calibration, of_ranks: Calibration | None = None) -> None:
        super().__init__(dataclasses.replace(spec, name=_measured_name(spec, found)), found)
        self.of_ranks = of_ranks

    def share(self, parts: int) -> ModelStages:
        """Raises UserError for more than one part: few rows take latency, which dividing work does not divide."""
        if parts > 1:
            card = self.hardware.name
            raise UserError(
                f"steps of {self.spec.name} were measured whole, and it lies on {parts} devices; backend.card={card} has costs of parts"
            )
        return self


def _measured_name(spec: ModelSpec, found: Calibration) -> str:
    """The name under which the model was measured."""
    for name in found.models():
        if dataclasses.replace(published_spec(name), name=spec.name) == spec:
            return name
    known = ", ".join(found.models())
    raise UserError(f"steps of {spec.name} were not measured on {found.hardware.name}; known models: {known}")


def known_measured() -> tuple[str, ...]:
    """Names of the shipped calibrations of cards."""
    return tuple(sorted(path.stem for path in MEASURED_DIRECTORY.glob(f"*{SUFFIX}.json")))


def shipped_measured(name: str) -> Calibration:
    """The shipped calibration of that name, one of :func:`known_measured`."""
    return _read(MEASURED_DIRECTORY / f"{name}.json")


def shipped_of_ranks(name: str) -> Calibration | None:
    """What ranks of groups take on that card; None where no group's steps are shipped."""
    path = MEASURED_DIRECTORY / f"{name}.groups.json"
    return _read(path) if path.exists() else None


_read = functools.cache(read_calibration)
