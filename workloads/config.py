"""What a workload is, as frozen dataclasses. A description plus its seeds is a trace, the same one everywhere.

Each part has a `kind`; values that a kind does not read may stand there (a scenario overrides a preset key by key) and
are not looked at. Ranges are checked in :mod:`workloads.validate`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from workloads.errors import WorkloadError


@dataclass(frozen=True)
class Arrivals:
    """When requests come.

    `rate_rps` is the mean rate, the total over all models (`rate_of: total`) or of each (`rate_of: model`). With
    `process_of: total` one process is split by popularity; with `model` each model has a process of its own at its share
    of the rate, so that a gamma CV or a burst is each model's.
    """

    kind: str = "poisson"  # poisson, gamma, bursts, constant, replay
    rate_rps: float = 1.0
    rate_of: str = "total"
    process_of: str = "total"
    cv: float = 1.0  # gamma: coefficient of variation of the gaps
    on_s: float = 10.0  # bursts: mean length of a burst
    off_s: float = 30.0  # bursts: mean length of the time between bursts
    off_rate_fraction: float = 0.0  # bursts: rate between bursts over the rate within one
    rate_scale: float = 1.0  # replay: 2 plays the file at twice its rate


@dataclass(frozen=True)
class Popularity:
    """Which model is asked. Rank 1 is the model that is listed first.

    `power_law`: rank^-alpha with the total rate fixed; `power_law_top`: MuxServe's variant, `rate_rps` is the top
    model's and the total follows; `dirichlet`: one draw of shares; `shares`: measured, by model name or in order;
    `tail`: the power law whose coldest `tail_models` of the models take `tail_tokens` of the load (OpenRouter, Fig. 1a).
    """

    kind: str = "power_law"
    alpha: float = 0.0
    concentration: float = 1.0
    shares: Any = ()  # numbers in order, or a mapping from model name to number; scaled to sum to 1
    tail_models: float = 0.9
    tail_tokens: float = 0.165


@dataclass(frozen=True)
class Lengths:
    """Tokens of prompt and output.

    `fixed` at the maxima; `uniform` between minimum and maximum; `lognormal` by median and sigma of the logarithm, cut to
    the same limits, prompt and output tied by `correlation`; `bins`: prompt and output together uniform within a context
    bin drawn from `bins`, the output uniform; `empirical`: (prompt, output) pairs of the source, resampled, within `bins`
    where any are named; `replay`: the source's rows in order, with the arrivals they came with.
    `scale` shrinks what was drawn (bins included), for small checkpoints.
    """

    kind: str = "uniform"
    prompt_min: int = 16
    prompt_max: int = 128
    output_min: int = 8
    output_max: int = 64
    prompt_median: float = 64.0
    prompt_sigma: float = 1.0
    output_median: float = 24.0
    output_sigma: float = 1.0
    correlation: float = 0.0
    bins: tuple[str, ...] = ()
    scale: float = 1.0


@dataclass(frozen=True)
class Prompts:
    """Token ids of the prompts, seeded per request.

    `random`: uniform over the vocabulary; `prefix`: `prefix_share` of the requests begin with one of `prefix_groups`
    common prefixes of `prefix_tokens`; `blocks`: ids by the source's prefix hashes, so that requests share what they shared
    when they were recorded; `text`: the source's text through the model's tokenizer; `none`: lengths only.
    """

    kind: str = "random"
    prefix_tokens: int = 32
    prefix_share: float = 1.0
    prefix_groups: int = 1


@dataclass(frozen=True)
class Injection:
    """A burst on top of the trace: `requests` long requests within `over_s` seconds from `at_s` on. None when 0."""

    requests: int = 0
    at_s: float = 0.0
    over_s: float = 1.0
    model: str = ""  # asked by all of them; empty: by popularity
    prompt_tokens: int = 1024
    output_tokens: int = 64


@dataclass(frozen=True)
class Source:
    """A real trace or data set that arrivals, lengths or prompts are taken from.

    `path` counts from `directory`, else from the directory that WORKLOAD_TRACES names. For sharegpt and longalign it is a
    JSON file, or the name of a data set on the hub; `tokenizer` counts their tokens for models that bring none.
    """

    format: str = ""  # azure, mooncake, burstgpt, lengths, sharegpt, longalign
    path: str = ""
    directory: str = ""
    split: str = "train"
    tokenizer: str = ""
    max_rows: int = 0  # 0: all


@dataclass(frozen=True)
class Seeds:
    """One seed for each choice, so that a sweep over one leaves the others as they are."""

    schedule: int = 0
    model: int = 0
    lengths: int = 0
    prompts: int = 0


@dataclass(frozen=True)
class WorkloadConfig:
    """A trace of `duration_s` seconds; or, where `trace_file` names one, the trace that was written there."""

    duration_s: float = 30.0
    arrivals: Arrivals = field(default_factory=Arrivals)
    popularity: Popularity = field(default_factory=Popularity)
    lengths: Lengths = field(default_factory=Lengths)
    prompts: Prompts = field(default_factory=Prompts)
    injection: Injection = field(default_factory=Injection)
    source: Source = field(default_factory=Source)
    seeds: Seeds = field(default_factory=Seeds)
    trace_file: str = ""


_PARTS = {
    "arrivals": Arrivals,
    "popularity": Popularity,
    "lengths": Lengths,
    "prompts": Prompts,
    "injection": Injection,
    "source": Source,
    "seeds": Seeds,
}


def workload_from_dict(content: Mapping[str, Any]) -> WorkloadConfig:
    """The workload that a plain dict describes; `rate`, where it is given and not null, is short for `arrivals.rate_rps` and
    stronger. Raises WorkloadError for unknown keys and values out of range."""
    from workloads.validate import validate

    if not isinstance(content, Mapping):
        raise WorkloadError(f"workload: a mapping is wanted, got {content!r}")
    content = dict(content)
    rate_rps = content.pop("rate", None)
    if rate_rps is not None and isinstance(content.setdefault("arrivals", {}), Mapping):
        content["arrivals"] = {**content["arrivals"], "rate_rps": rate_rps}
    built = {
        key: _build(_PARTS[key], value, f"workload.{key}") if key in _PARTS else value for key, value in content.items()
    }
    config = _build(WorkloadConfig, built, "workload")
    validate(config)
    return config


def _build(cls: type, content: Any, where: str) -> Any:
    if not isinstance(content, Mapping):
        raise WorkloadError(f"{where}: a mapping is wanted, got {content!r}")
    known = [f.name for f in dataclasses.fields(cls)]
    for key in content:
        if key not in known:
            raise WorkloadError(f"{where}: unknown key {key!r}; known: {', '.join(known)}")
    return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in content.items()})
