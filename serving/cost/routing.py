"""How many distinct experts a batch hits under the routing distributions of the measured data, and under uniform routing.

`balanced` gives every expert its share, so T tokens hit min(E, T k) experts. `power_law_A` draws a popularity for each
expert from a power law of exponent A, scales it to T k assignments and rounds; what rounding leaves over goes to the
experts that would have got nothing. The rule was inferred from the measured latencies (time is linear in distinct experts,
and this rule makes skewed and balanced rows fall on one line) and from the published description of the collector
(ai-dynamo/aiconfigurator): bounds (0.01, 2) while T k <= E, (1, 0.8 T) beyond.
"""

from __future__ import annotations

import functools

import numpy as np

from serving.errors import UserError

DRAWS = 32
SEED = 0


@functools.lru_cache(maxsize=65536)
def distinct_experts(tokens: int, num_experts: int, top_k: int, distribution: str = "uniform") -> float:
    """Expected distinct experts that `tokens` tokens hit. Raises :class:`UserError` for an unknown distribution."""
    if distribution == "uniform":
        return num_experts * (1.0 - (1.0 - top_k / num_experts) ** tokens)
    if distribution == "balanced":
        return float(min(num_experts, tokens * top_k))
    if distribution.startswith("power_law_"):
        loads = _power_law_loads(tokens, num_experts, top_k, float(distribution.removeprefix("power_law_")))
        return float((loads > 0).sum(axis=1).mean())
    raise UserError(f"unknown routing distribution {distribution!r}; known: uniform, balanced, power_law_<exponent>")


def _power_law_loads(tokens: int, num_experts: int, top_k: int, exponent: float) -> np.ndarray:
    """[DRAWS, num_experts] tokens an expert, each row adding up to `tokens * top_k`."""
    assignments = tokens * top_k
    low, high = (1.0, 0.8 * tokens) if assignments > num_experts else (0.01, 2.0)
    uniform = np.random.default_rng(SEED).random((DRAWS, num_experts))
    power = 1.0 - exponent
    popularity = ((high**power - low**power) * uniform + low**power) ** (1.0 / power)
    loads = np.rint(popularity / popularity.sum(axis=1, keepdims=True) * assignments).astype(np.int64)
    return np.stack([_settle(np.sort(row), assignments) for row in loads])


def _settle(loads: np.ndarray, assignments: int) -> np.ndarray:
    """Ascending `loads` made to add up to `assignments`, the least loaded experts first."""
    delta = assignments - int(loads.sum())
    if delta >= 0:
        loads = loads + delta // len(loads)
        loads[: delta % len(loads)] += 1
        return loads
    surplus = -delta
    while surplus:
        loaded = np.flatnonzero(loads)[:surplus]
        loads[loaded] -= 1
        surplus -= len(loaded)
    return loads
