"""From what a command is given (a preset's name, a YAML file, a trace file) to a workload and the models it asks."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from workloads.columnar import ModelLimits
from workloads.config import WorkloadConfig, workload_from_dict
from workloads.errors import WorkloadError

_REPOSITORY = Path(__file__).resolve().parents[1]
_CONF = _REPOSITORY / "conf"
_PUBLISHED = _REPOSITORY / "serving" / "checkpoints" / "published"
_CHECKPOINTS = _REPOSITORY / "checkpoints"  # where checkpoints are made
ASSUMED = ModelLimits("", vocab_size=32_000, max_context_tokens=1 << 18)


def compose(
    config: str, overrides: Sequence[str], models: int | None, assumed: ModelLimits = ASSUMED
) -> tuple[WorkloadConfig, list[ModelLimits], list[str]]:
    """The workload of `config`, a scenario (`conf/conf`), a workload preset (`conf/workload`) or a YAML file of the same
    content, with Hydra's overrides; its models; and the names of those whose limits are `assumed`, for want of a
    checkpoint. `models` puts so many made-up models in the place of those named there. Raises WorkloadError."""
    path = Path(config)
    is_preset = path.suffix not in (".yaml", ".yml") or _CONF in path.resolve().parents
    content = _preset(config, overrides) if is_preset else _plain(path, overrides)
    entries = content.get("models") or [{"name": f"model-{number}"} for number in range(4)]
    if models is not None:
        entries = [{"name": f"model-{number:04d}"} for number in range(models)]
    found = {str(entry["name"]): checkpoint_limits(entry) for entry in entries}
    limits = [known or dataclasses.replace(assumed, name=name) for name, known in found.items()]
    return workload_from_dict(content["workload"]), limits, [name for name, known in found.items() if known is None]


def checkpoint_limits(entry: Mapping[str, Any]) -> ModelLimits | None:
    """A model's limits from the `config.json` of its checkpoint, of one that was made of the same architecture and size, or
    from its published configuration; None where there is none."""
    directory = _checkpoint(entry)
    published = _PUBLISHED / f"{entry.get('published')}.json"
    if directory is None and not published.is_file():
        return None
    file = directory / "config.json" if directory else published
    try:
        found = json.loads(file.read_text())
        vocabulary, context = int(found["vocab_size"]), int(found["max_position_embeddings"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WorkloadError(f"{file}: no vocab_size and max_position_embeddings ({error})") from None
    return ModelLimits(str(entry["name"]), vocabulary, context, str(directory or ""))


def _checkpoint(entry: Mapping[str, Any]) -> Path | None:
    if entry.get("checkpoint"):
        directory = _REPOSITORY / str(entry["checkpoint"])
        return directory if directory.is_dir() else None
    wanted = entry.get("make") or {}
    for made in sorted(_CHECKPOINTS.glob("*/made.json")):
        content = json.loads(made.read_text())
        if wanted and (content.get("architecture"), content.get("size")) == (wanted.get("arch"), wanted.get("size")):
            return made.parent
    return None


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
