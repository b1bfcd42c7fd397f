"""When requests come: arrival times in [0, duration), in order. Gaps are never cut short: a process is drawn until it
passes the end, so that the mean rate is the one that was asked for."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from workloads.config import Arrivals
from workloads.errors import WorkloadError

_FIRST_CHUNK_MARGIN = 1.05
_MOST_REQUESTS = 200_000_000  # 5 GB of columns: more is a slip of the pen


def arrival_times(arrivals: Arrivals, rate_rps: float, duration_s: float, rng: np.random.Generator) -> np.ndarray:
    """Times [S] float64 in seconds, ascending, of a process with mean `rate_rps`. Not for `replay`."""
    if rate_rps * duration_s > _MOST_REQUESTS:
        raise WorkloadError(
            f"workload: {rate_rps:g} req/s for {duration_s:g} s is {rate_rps * duration_s:.3g} requests; "
            f"at most {_MOST_REQUESTS:.0e} fit a trace"
        )
    return _PROCESSES[arrivals.kind](arrivals, rate_rps, duration_s, rng)


def replay_times(recorded_s: np.ndarray, rate_scale: float, duration_s: float) -> np.ndarray:
    """Recorded times, from the first one on, played `rate_scale` times as fast, up to `duration_s`."""
    times = (recorded_s - recorded_s[0]) / rate_scale if len(recorded_s) else recorded_s
    return times[: np.searchsorted(times, duration_s, side="left")]


def burst_rates(arrivals: Arrivals, rate_rps: float) -> tuple[float, float]:
    """Rates within and between bursts whose mean over time is `rate_rps`."""
    on_share = arrivals.on_s / (arrivals.on_s + arrivals.off_s)
    on_rate = rate_rps / (on_share + (1 - on_share) * arrivals.off_rate_fraction)
    return on_rate, on_rate * arrivals.off_rate_fraction


def _poisson(arrivals: Arrivals, rate_rps: float, duration_s: float, rng: np.random.Generator) -> np.ndarray:
    return _renewal(lambda size: rng.exponential(1.0 / rate_rps, size), rate_rps, duration_s)


def _gamma(arrivals: Arrivals, rate_rps: float, duration_s: float, rng: np.random.Generator) -> np.ndarray:
    """Gamma gaps of shape 1/CV^2, from equilibrium: the first arrival lies where a process that began long ago would
    have it. Begun with a full gap, a short bursty trace would have too many requests (by (CV^2 - 1)/2 of them)."""
    shape = 1.0 / arrivals.cv**2
    scale = 1.0 / (rate_rps * shape)
    # the gap that covers a random instant is drawn in proportion to its length: Gamma(shape + 1); what is left of it, uniform
    first = rng.gamma(shape + 1.0, scale) * rng.random()
    return _renewal(lambda size: rng.gamma(shape, scale, size), rate_rps, duration_s, first)


def _constant(arrivals: Arrivals, rate_rps: float, duration_s: float, rng: np.random.Generator) -> np.ndarray:
    """Equal gaps from a random phase, so that models with processes of their own do not arrive in step."""
    times = (rng.random() + np.arange(int(np.ceil(rate_rps * duration_s)) + 1)) / rate_rps
    return times[times < duration_s]


def _renewal(
    gaps: Callable[[int], np.ndarray], rate_rps: float, duration_s: float, first_s: float | None = None
) -> np.ndarray:
    """Sums of gaps in [0, duration), drawn in chunks until the duration is passed."""
    chunks = [] if first_s is None else [np.array([first_s])]
    last = 0.0 if first_s is None else first_s
    while last < duration_s:
        size = max(16, int(_FIRST_CHUNK_MARGIN * rate_rps * (duration_s - last)) + 1)
        chunks.append(last + gaps(size).cumsum())
        last = float(chunks[-1][-1])
    times = np.concatenate(chunks)
    return times[times < duration_s]


def _bursts(arrivals: Arrivals, rate_rps: float, duration_s: float, rng: np.random.Generator) -> np.ndarray:
    """On/off: a Poisson process whose rate switches; the state at 0 is drawn as it is at a random time."""
    within_first = rng.random() < arrivals.on_s / (arrivals.on_s + arrivals.off_s)
    means = (arrivals.on_s, arrivals.off_s) if within_first else (arrivals.off_s, arrivals.on_s)
    spans: list[np.ndarray] = []
    covered_s = 0.0
    while covered_s < duration_s:
        pairs = max(8, int((duration_s - covered_s) / sum(means)) + 1)
        spans.append(rng.exponential(means, (pairs, 2)).ravel())
        covered_s += float(spans[-1].sum())
    lengths = np.concatenate(spans)
    starts = np.concatenate(([0.0], lengths.cumsum()[:-1]))
    rates = np.tile(burst_rates(arrivals, rate_rps)[:: 1 if within_first else -1], len(lengths) // 2)
    lengths = np.clip(duration_s - starts, 0.0, lengths)
    counts = rng.poisson(rates * lengths)
    # given their number, the arrivals of a Poisson process lie uniformly within their span
    times = np.sort(np.repeat(starts, counts) + rng.random(counts.sum()) * np.repeat(lengths, counts))
    return times[times < duration_s]


_PROCESSES = {"poisson": _poisson, "gamma": _gamma, "bursts": _bursts, "constant": _constant}
