"""Stage costs of a model on a card by name: fitted where the card has a fit, a roofline of its datasheet otherwise."""

from __future__ import annotations

import functools

from serving.cost.fitted_set import FITTED_DIRECTORY
from serving.cost.hardware import Hardware, load_hardware
from serving.cost.operators import CostModel
from serving.cost.roofline import RooflineStages
from serving.cost.stages import ModelStages, StageCosts
from serving.interface import ServedModel


def stages_on(card: str, model: ServedModel) -> ModelStages:
    """Raises :class:`UserError` for an unknown card, listing the known. Fits are of bfloat16; other widths of the same card
    move bytes by their own size."""
    hardware = load_hardware(card)
    if (FITTED_DIRECTORY / f"{hardware.fitted_on}.json").exists():
        return StageCosts(model.spec, _cost_model(hardware.name, model.dtype))
    return RooflineStages(model.spec, model.dtype, hardware)


@functools.cache
def _cost_model(card: str, dtype: str) -> CostModel:
    hardware: Hardware = load_hardware(card)
    return CostModel(hardware, dtype)
