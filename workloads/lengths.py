"""How long prompts and outputs are: whole numbers of tokens, one at least, before any model's context clips them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from workloads.config import Lengths
from workloads.errors import WorkloadError
from workloads.validate import bin_tokens


@dataclass(frozen=True, eq=False)
class Drawn:
    """Lengths [S] int32. `cut_share`: share of the untruncated law that lay outside the limits, by part, where the law
    has limits. `rows`: the source's row of each request, where there is a source."""

    prompt: np.ndarray
    output: np.ndarray
    cut_share: dict[str, float]
    rows: np.ndarray | None = None


def draw_lengths(lengths: Lengths, count: int, rng: np.random.Generator) -> Drawn:
    """Lengths of `count` requests by a law (`empirical` has :func:`resample`, `replay` draws nothing)."""
    if lengths.kind == "fixed":
        prompt, output = np.full(count, lengths.prompt_max), np.full(count, lengths.output_max)
    elif lengths.kind == "uniform":
        of_prompt, of_output = rng.spawn(2)  # streams apart: request i has its lengths whatever `count` is
        prompt = of_prompt.integers(lengths.prompt_min, lengths.prompt_max, count, endpoint=True)
        output = of_output.integers(lengths.output_min, lengths.output_max, count, endpoint=True)
    elif lengths.kind == "lognormal":
        return _lognormal(lengths, count, rng)
    else:
        prompt, output = _bins(lengths, count, rng)
    return Drawn(scaled(prompt, lengths.scale), scaled(output, lengths.scale), {})


def resample(lengths: Lengths, prompt: np.ndarray, output: np.ndarray, uniform: np.ndarray) -> Drawn:
    """One of the source's pairs for each number of `uniform` [S] in [0, 1), with replacement, of those within the bins
    where any are named."""
    rows = rows_in_bins(lengths, prompt, output)
    chosen = rows[(uniform * len(rows)).astype(np.int64)]
    return Drawn(scaled(prompt[chosen], lengths.scale), scaled(output[chosen], lengths.scale), {}, chosen)


def rows_in_bins(lengths: Lengths, prompt: np.ndarray, output: np.ndarray) -> np.ndarray:
    """The source's rows whose context lies within the named bins; all where none is named."""
    rows = np.arange(len(prompt))
    if not lengths.bins:
        return rows
    context = prompt + output
    edges = [bin_tokens(name) for name in lengths.bins]
    rows = rows[np.any([(context >= low) & (context <= high) for low, high in edges], axis=0)]
    if not len(rows):
        raise WorkloadError(f"workload.lengths.bins: the source has no row within {', '.join(lengths.bins)}")
    return rows


def scaled(tokens: np.ndarray, scale: float) -> np.ndarray:
    """Whole tokens, one at least."""
    if scale == 1:
        return np.maximum(tokens, 1).astype(np.int32)
    return np.maximum(np.rint(tokens * scale), 1).astype(np.int32)


def lognormal_mass(median: float, sigma: float, low: float, high: float) -> tuple[float, float]:
    """The log-normal law's probability below `low - 0.5` and below `high + 0.5`: whole numbers take what rounds to
    them."""
    from scipy.special import ndtr

    below, upto = ndtr((np.log(np.array([low - 0.5, high + 0.5])) - np.log(median)) / sigma)
    return float(below), float(upto)


def _lognormal(lengths: Lengths, count: int, rng: np.random.Generator) -> Drawn:
    """Two log-normal laws, each conditioned on its limits, tied by a Gaussian copula.

    The limits act on each part's own quantiles (truncation, not clipping: nothing piles up at them), so that each part has
    exactly the truncated law whatever the correlation, which is that of the underlying normals."""
    from scipy.special import ndtr, ndtri

    normals = {part: own.standard_normal(count) for part, own in zip(("prompt", "output"), rng.spawn(2), strict=True)}
    tied = lengths.correlation * normals["prompt"]
    normals["output"] = tied + np.sqrt(1 - lengths.correlation**2) * normals["output"]
    parts, cut = {}, {}
    for part, normal in normals.items():
        median, sigma = getattr(lengths, f"{part}_median"), getattr(lengths, f"{part}_sigma")
        low, high = getattr(lengths, f"{part}_min"), getattr(lengths, f"{part}_max")
        below, upto = lognormal_mass(median, sigma, low, high)
        if not upto - below > 1e-6:
            raise WorkloadError(
                f"workload.lengths: {part}_min {low} to {part}_max {high} holds none of a log-normal law of median "
                f"{median:g} and sigma {sigma:g}"
            )
        tokens = np.rint(median * np.exp(sigma * ndtri(below + (upto - below) * ndtr(normal))))
        parts[part] = scaled(np.clip(tokens, low, high), lengths.scale)
        cut[part] = 1 - (upto - below)
    return Drawn(parts["prompt"], parts["output"], cut)


def _bins(lengths: Lengths, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    edges = np.array([bin_tokens(name) for name in lengths.bins])
    of_bin, of_context, of_output = rng.spawn(3)
    low, high = edges[of_bin.integers(0, len(edges), count)].T
    context = of_context.integers(low, high, endpoint=True)
    output = of_output.integers(lengths.output_min, lengths.output_max, count, endpoint=True)
    return context - output, output
