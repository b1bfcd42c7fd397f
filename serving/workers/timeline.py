"""What ran where and when, recorded by each worker at about 0.2 us a span and written once, when the worker stops."""

from __future__ import annotations

from pathlib import Path

import numpy as np

# finish: the last residual, LM head and sampling; a2f and f2a: rows on their way to the FFN and back
STAGES = ("attention", "ffn", "finish", "a2f", "f2a")
ATTENTION, FFN, FINISH, A2F, F2A = range(len(STAGES))
SPAN = np.dtype(
    [
        ("start_ns", np.int64),
        ("end_ns", np.int64),
        ("stage", np.int16),
        ("lane", np.int16),
        ("model", np.int32),
        ("layer", np.int32),
        ("rows", np.int32),
    ]
)


class Recorder:
    """Spans of one worker. `model` is the index by which the worker knows it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._spans: list[tuple[int, ...]] = []

    def add(self, start_ns: int, end_ns: int, stage: int, lane: int, model: int, layer: int, rows: int) -> None:
        self._spans.append((start_ns, end_ns, stage, lane, model, layer, rows))

    def save(self) -> None:
        """Write what was recorded, whole or not at all."""
        partial = self._path.with_suffix(".partial")
        with partial.open("wb") as file:
            np.save(file, np.array(self._spans, dtype=SPAN))
        partial.replace(self._path)
