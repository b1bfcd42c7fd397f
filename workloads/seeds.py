"""Random streams, one a choice. A tuple of numbers is no safe seed: numpy pads with zeros, so that `default_rng(1)` and
`default_rng((1, 0))` are one stream, and seed 1 of the schedule would draw the gaps that seed 0 draws models by."""

from __future__ import annotations

import numpy as np

SCHEDULE, MODEL, LENGTHS, SHARES, INJECTED = range(5)  # what a stream is for


def stream(seed: int, purpose: int, number: int = 0) -> np.random.Generator:
    """The stream of `seed` for one purpose (and, say, for the model `number`), independent of all others."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(purpose, number)))
