"""Stage costs of a model on a card by name: measured steps of our engine where the name says so, else fitted where the card has a
fit, a roofline of its datasheet otherwise."""

from __future__ import annotations

import functools

from serving.cost.fitted_set import FITTED_DIRECTORY
from serving.cost.hardware import Hardware, known_hardware, load_hardware
from serving.cost.measured_card import CardStages, known_measured, shipped_measured, shipped_of_ranks
from serving.cost.operators import CostModel
from serving.cost.roofline import RooflineStages
from serving.cost.stages import ModelStages, StageCosts
from serving.errors import UserError
from serving.interface import ServedModel


def hardware_of(card: str) -> Hardware:
    """What is called `card`: a description in conf/hardware, or one with measured steps of our engine. Raises
    :class:`UserError` for any other name, listing the known."""
    if card in known_measured():
        return shipped_measured(card).hardware
    if card not in known_hardware():
        raise UserError(
            f"unknown hardware {card!r}; known: {', '.join(sorted((*known_hardware(), *known_measured())))}"
        )
    return load_hardware(card)


def stages_on(card: str, model: ServedModel) -> ModelStages:
    """Raises :class:`UserError` for an unknown card, listing the known. Fits are of bfloat16; other widths of the same card
    move bytes by their own size."""
    if card in known_measured():
        return CardStages(model.spec, shipped_measured(card), shipped_of_ranks(card))
    hardware = hardware_of(card)
    if (FITTED_DIRECTORY / f"{hardware.fitted_on}.json").exists():
        return StageCosts(model.spec, _cost_model(hardware.name, model.dtype))
    return RooflineStages(model.spec, model.dtype, hardware)


@functools.cache
def _cost_model(card: str, dtype: str) -> CostModel:
    hardware: Hardware = load_hardware(card)
    return CostModel(hardware, dtype)
