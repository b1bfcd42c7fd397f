"""How one request's pages grow with its age: a staircase that the closed form integrates and the sweep-line replays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from crosspool.planner.demand import ModelDemand


@dataclass(frozen=True, eq=False)
class Staircase:
    """Steps of all S joint samples, grouped by sample and in order of age. Step i of sample `sample[i]` starts at the
    share `start[i]` of its service time, lasts until `end[i]`, and holds `pages[i]` pages (all runs)."""

    sample: np.ndarray
    start: np.ndarray
    end: np.ndarray
    pages: np.ndarray
    first: np.ndarray  # [S] index of each sample's first step


def staircase(model: ModelDemand, page_bytes: int, holding: str = "grown") -> Staircase:
    """The steps of each of `model`'s samples. Exact: tokens are whole, pages as the virtualizer rounds them."""
    prompt, output, token_bytes = model.prompt_tokens, model.output_tokens, model.run_token_bytes
    last = -(-(prompt + output) * token_bytes // page_bytes)
    level = -(-prompt * token_bytes // page_bytes) if holding == "grown" else last
    steps = last - level + 1
    first = np.cumsum(steps) - steps
    sample = np.repeat(np.arange(prompt.size), steps)
    page = level[sample] + np.arange(sample.size) - first[sample]  # of each run
    # A run takes its page number j + 1 when the token after floor(j * page / token) has begun to grow.
    full = (page - 1) * page_bytes // token_bytes
    with np.errstate(divide="ignore", invalid="ignore"):
        start = (full - prompt[sample]) / output[sample]
    start[first] = 0.0
    end = np.append(start[1:], 1.0)
    end[np.append(first[1:], sample.size) - 1] = 1.0
    return Staircase(sample, start, end, page * model.num_runs, first)
