"""From the configuration of an engine whose weights leave its card to the worker: see :mod:`serving.residency.lent_weights`.

What engines share is the ledger, which says how many bytes of the card each may hold; the memory itself is each process's own
(serving/cuda/memory.py). So weights take pages of the ledger for as many bytes as their frames have, which are larger, because
mapping costs by the piece, and which are created when the weights come and destroyed when they leave.
"""

from __future__ import annotations

import torch

from serving.cuda.build import borrow, card, open_pool, prepare_process, weights_of
from serving.cuda.capture import CardModel
from serving.cuda.ffn_parts import FFNParts
from serving.cuda.residency import CardArena, CardLoader
from serving.cuda.runner import StepRunner
from serving.cuda.worker import CardWorker
from serving.idle import IdleWeights
from serving.residency.image import CARD_FRAME_BYTES, placed_bytes
from serving.residency.lent_weights import LentWeights
from serving.workers.config import ModelWorkerConfig
from serving.workers.mapped_pages import growth_over
from serving.workers.model_worker import HostedModel

_ONLY = 0  # the engine's one model, in its arena


class CardWeights:
    """The weights of one model on a card, `pages` of the ledger. `arena`, which keeps no frames, holds nothing else."""

    def __init__(self, arena: CardArena, loader: CardLoader, pages: int) -> None:
        self.pages = pages
        self._arena, self._loader = arena, loader

    @property
    def used_bytes(self) -> int:
        return self._arena.images[_ONLY].used_bytes

    def load(self, pages: list[int]) -> None:
        """Begin to come; the bytes of `pages` are those of frames of this process."""
        self._loader.start(_ONLY)

    def loaded(self) -> bool:
        self._loader.poll()
        return not self._loader.busy

    def leave(self) -> None:
        self._loader.finish()
        self._arena.evict(_ONLY)


@torch.inference_mode()
def build_lent_weights_worker(role: ModelWorkerConfig, wires) -> CardWorker:
    """A loaded, warmed-up worker of one model. Raises CapacityError where the ledger has no pages for its weights, or the host no
    memory to pin for their copy."""
    prepare_process(role.mps_pipe_dir)
    device = card(role.device)
    torch.cuda.set_device(device)
    (model,), (config,) = role.models, role.pools
    _, lender = borrow(role.lent)
    pages = placed_bytes(model, "cuda", config.page_bytes) // config.page_bytes
    arena = CardArena(placed_bytes(model, "cuda") // CARD_FRAME_BYTES, [model], device, kept=False)
    loader = CardLoader(arena, [0], device)
    weights = LentWeights(CardWeights(arena, loader, pages), lender, wires.counters)
    image = arena.open(_ONLY)
    image.build(weights_of(model, device))
    torch.cuda.synchronize(device)
    arena.evict(_ONLY)
    pool = open_pool(config.num_pages, config.page_bytes, [model], config.max_runs, role.device, lender)
    kv = pool.models[model.name]
    runner = StepRunner(
        [CardModel.of(image.attention, FFNParts(image.ffn), kv)], role.lanes, role.limits, "fused", loader
    )
    weights.start()
    hosted = [HostedModel(_ONLY, image.attention, kv, runner, _ONLY, model.spec.num_layers)]
    idle = IdleWeights(role.evict_idle_s, weights)
    return CardWorker(
        runner, hosted, [(config.name, pool)], role.limits, role.lanes, wires.control, wires.tokens, wires.counters,
        role.sample_interval_ms, wires.recorder,
        growth=growth_over(role, pool, [kv], wires.counters, idle), weights=weights,
    )  # fmt: skip
