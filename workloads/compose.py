"""From what a command is given (a preset's name, a YAML file, a trace file) to a workload and the models it asks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from workloads.columnar import ModelLimits
from workloads.config import WorkloadConfig, workload_from_dict
from workloads.errors import WorkloadError

_REPOSITORY = Path(__file__).resolve().parents[1]
_CONF = _REPOSITORY / "conf"
ASSUMED_VOCABULARY = 32_000
ASSUMED_CONTEXT = 1 << 18


def compose(config: str, overrides: Sequence[str], models: int | None) -> tuple[WorkloadConfig, list[ModelLimits]]:
    """The workload of `config`, a scenario (`conf/conf`), a workload preset (`conf/workload`) or a YAML file of the same
    content, with Hydra's overrides. `models` puts so many made-up models in the place of those named there. Raises
    WorkloadError."""
    path = Path(config)
    is_preset = path.suffix not in (".yaml", ".yml") or _CONF in path.resolve().parents
    content = _preset(config, overrides) if is_preset else _plain(path, overrides)
    workload = content["workload"]
    if models is not None:
        return workload_from_dict(workload), [_made_up(f"model-{number:04d}") for number in range(models)]
    entries = content.get("models") or [{"name": f"model-{number}"} for number in range(4)]
    return workload_from_dict(workload), [limits_of(entry) for entry in entries]


def limits_of(entry: Mapping[str, Any]) -> ModelLimits:
    """A model's limits from its checkpoint's `config.json`; where there is none yet, a wide context and a usual
    vocabulary."""
    directory = _REPOSITORY / str(entry.get("checkpoint") or "")
    if not entry.get("checkpoint") or not (directory / "config.json").is_file():
        return _made_up(str(entry["name"]))
    try:
        found = json.loads((directory / "config.json").read_text())
        vocabulary, context = int(found["vocab_size"]), int(found["max_position_embeddings"])
    except (ValueError, KeyError, TypeError) as error:
        raise WorkloadError(
            f"{directory / 'config.json'}: no vocab_size and max_position_embeddings ({error})"
        ) from None
    return ModelLimits(str(entry["name"]), vocabulary, context, str(directory))


def _made_up(name: str) -> ModelLimits:
    return ModelLimits(name, ASSUMED_VOCABULARY, ASSUMED_CONTEXT)


def _preset(config: str, overrides: Sequence[str]) -> dict[str, Any]:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    name = Path(config).name.removesuffix(".yaml")
    groups = {"conf": _CONF / "conf", "workload": _CONF / "workload"}
    group = next((group for group, folder in groups.items() if (folder / f"{name}.yaml").is_file()), None)
    if group is None:
        known = sorted(path.stem for folder in groups.values() for path in folder.glob("*.yaml"))
        raise WorkloadError(f"{config}: no preset, no YAML and no trace file; presets: {', '.join(known)}")
    try:
        with initialize_config_dir(str(_CONF), version_base="1.3"):
            composed = hydra_compose("bench", overrides=[f"{group}={name}", *overrides])
        content = OmegaConf.to_container(composed, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise WorkloadError(f"{config}: {' '.join(str(error).split())[:200]}") from None
    return content  # type: ignore[return-value]


def _plain(path: Path, overrides: Sequence[str]) -> dict[str, Any]:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    if not path.is_file():
        raise WorkloadError(f"{path}: no such file")
    try:
        content = OmegaConf.load(path)
        if "workload" not in content:
            content = OmegaConf.create({"workload": content})
        content = OmegaConf.merge(content, OmegaConf.from_dotlist(list(overrides)))
        return OmegaConf.to_container(content, resolve=True)  # type: ignore[return-value]
    except (YAMLError, OmegaConfBaseException, TypeError, ValueError, AttributeError) as error:
        raise WorkloadError(f"{path}: no YAML of a workload ({' '.join(str(error).split())[:160]})") from None
