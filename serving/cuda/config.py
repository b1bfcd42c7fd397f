"""What a worker on a card is told beside what every model worker is told."""

from __future__ import annotations

from dataclasses import dataclass

from serving.interface import Device
from serving.parallel.ffn_part import FFNPart
from serving.workers.config import ModelWorkerConfig

CONTROLS = ("fused", "lowered", "host", "resident")


@dataclass(frozen=True)
class CardWorkerConfig(ModelWorkerConfig):
    """One process that drives the card of the KV pool (`device`) and those of the weights pool: `ffn_parts[i]` are
    the devices that hold model i's FFN and the layers that each has, on cards of their own or on one that others share,
    every device under a budget of its own.

    `control` says how the halves find each other: `fused` is one graph for both (co-located), `lowered` one graph a side
    that meet through mailboxes, `resident` the executor that never returns on the FFN's side, and `host` a graph a stage,
    each launched by the host once the one before is done.
    """

    ffn_parts: tuple[tuple[tuple[Device, FFNPart], ...], ...] = ()
    control: str = "lowered"
