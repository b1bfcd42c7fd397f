"""A planner's configuration: YAML in, frozen dataclasses out, and one clear line for whatever is wrong in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from crosspool.planner.demand import SamplingRule
from crosspool.planner.from_trace import ServiceModel
from serving.errors import UserError
from serving.spec import element_bytes


@dataclass(frozen=True)
class LengthsConfig:
    """Joint (prompt, output) samples: those of a `trace` (see :func:`crosspool.planner.traces.find_trace`), or
    lognormal ones of the given means and coefficients of variation, cut at `max_tokens` each."""

    trace: str = ""
    samples: int = 4096
    prompt_mean: float = 0.0
    prompt_cv: float = 1.0
    output_mean: float = 0.0
    output_cv: float = 1.0
    max_tokens: int = 1 << 20

    def __post_init__(self) -> None:
        if not self.trace and min(self.prompt_mean, self.output_mean, self.prompt_cv, self.output_cv) <= 0:
            raise UserError("lengths: give a trace, or prompt_mean, output_mean and both cv above 0")
        if self.samples < 1 or self.max_tokens < 1:
            raise UserError("lengths: samples and max_tokens are at least 1")


@dataclass(frozen=True)
class ModelConfig:
    """One model: its shape (`architecture`: the keys of a `config.json`, or the directory of a `checkpoint`) and its
    load.

    `rate_rps` null takes the trace's. `request_tokens` is the longest request, prompt and output, that must fit.
    """

    name: str
    lengths: LengthsConfig
    architecture: Mapping[str, Any] = field(default_factory=dict)
    checkpoint: str = ""
    dtype: str = "bfloat16"
    rate_rps: float | None = None
    request_tokens: int = 0
    service: ServiceModel = field(default_factory=ServiceModel)

    def __post_init__(self) -> None:
        element_bytes(self.dtype)
        if bool(self.architecture) == bool(self.checkpoint):
            raise UserError(f"{self.name}: give either architecture (as in config.json) or checkpoint (a directory)")
        if self.rate_rps is None and not self.lengths.trace:
            raise UserError(f"{self.name}: rate_rps is missing, and there is no trace to take it from")


@dataclass(frozen=True)
class DevicesConfig:
    """`count` devices of `memory_bytes` each."""

    count: int
    memory_bytes: int
    name: str = "device"


@dataclass(frozen=True)
class PoolsConfig:
    """`kv_devices` null takes the fewest with which everything fits; the rest as in LayoutOptions."""

    kv_devices: int | None = 1
    ffn_split: str = "layers"
    kv_workspace_bytes: int = 0
    weights_workspace_bytes: int = 0


@dataclass(frozen=True)
class CheckConfig:
    """Check of the plan on parts of `model`'s trace that it was not fitted on, in blocks of `block_s`; `history_s` is
    what a rolling plan looks back on."""

    model: str
    block_s: float = 60.0
    history_s: float = 300.0

    def __post_init__(self) -> None:
        if min(self.block_s, self.history_s) <= 0:
            raise UserError("check: block_s and history_s are above 0")


@dataclass(frozen=True)
class PlannerConfig:
    """All of one plan. The pool's budget is the demand at the last of `quantiles`.

    `layers_per_run`: layers of a model whose KV shares pages, side by side in one contiguous run of a request. The
    engine gives each layer a run of its own (1); large pages waste less with more. The last group counts as full."""

    name: str
    page_bytes: int
    devices: DevicesConfig
    models: tuple[ModelConfig, ...]
    pools: PoolsConfig = field(default_factory=PoolsConfig)
    sampling: SamplingRule = field(default_factory=SamplingRule)
    quantiles: tuple[float, ...] = (0.95, 0.99)
    layers_per_run: int = 1
    seed: int = 0
    check: CheckConfig | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "quantiles", tuple(sorted(self.quantiles)))
        names = [model.name for model in self.models]
        if not names or len(set(names)) != len(names):
            raise UserError(f"models need names that differ, one at least: {names}")
        if self.page_bytes < 1 or self.layers_per_run < 1 or self.seed < 0:
            raise UserError("page_bytes and layers_per_run are at least 1, seed at least 0")
        if not self.quantiles or not 0 < self.quantiles[0] <= self.quantiles[-1] < 1:
            raise UserError(f"quantiles {list(self.quantiles)} must lie in (0, 1); 0.95 and 0.99 are usual")
        if self.check and self.check.model not in names:
            raise UserError(f"check.model {self.check.model!r} is no model of this plan; known: {', '.join(names)}")


_NESTED = {
    "lengths": LengthsConfig,
    "service": ServiceModel,
    "devices": DevicesConfig,
    "pools": PoolsConfig,
    "sampling": SamplingRule,
    "check": CheckConfig,
}


def load_config(path: str | Path) -> PlannerConfig:
    """The configuration in the YAML file `path`. Raises UserError that names the file and what is wrong in it."""
    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; examples lie in conf/planner") from None
    except (OSError, YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as YAML ({error})") from None
    try:
        return _build(PlannerConfig, content, "")
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _build(kind: type, content: Any, where: str) -> Any:
    """`content` as a `kind`, its nested parts too; `where` is the dotted place in the file."""
    if not isinstance(content, Mapping):
        raise UserError(f"{where or 'the file'} must map names to values, not be {content!r}")
    known = {f.name for f in dataclasses.fields(kind)}
    values = {}
    for key, value in content.items():
        place = f"{where}.{key}" if where else str(key)
        if key not in known:
            raise UserError(f"unknown key {place}; known: {', '.join(sorted(known))}")
        values[key] = _value(key, value, place)
    try:
        return kind(**values)
    except TypeError as error:  # a missing key, or a value that does not compare as a number
        raise UserError(f"{where or 'the file'}: {str(error).replace('__init__() ', '')}") from None


def _value(key: str, value: Any, place: str) -> Any:
    if key == "models":
        if not isinstance(value, list):
            raise UserError("models must be a list")
        return tuple(_build(ModelConfig, entry, f"models[{index}]") for index, entry in enumerate(value))
    if key in _NESTED and value is not None:
        return _build(_NESTED[key], value, place)
    return tuple(value) if isinstance(value, list) else value
