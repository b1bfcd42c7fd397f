"""What a person reads when a command line does not compose: what is wrong, and which names would be right."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from serving.errors import one_line

_NOISE = ("provider=", "Config search path", "Set the env", "See https")


def explain(error: Exception, configuration: Path, arguments: Sequence[str]) -> str:
    """One line for an error of Hydra. `configuration` is the folder of the configuration, `arguments` the command's own."""
    unknown_key = re.search(r"Could not override '([^']+)'|Error merging override ([^=]+)=", str(error))
    if unknown_key:
        found = _unknown_key(unknown_key[1] or unknown_key[2], configuration, arguments)
        if found:
            return found
    if "'hydra/launcher/submitit_" in str(error):
        return "SLURM's launcher needs an optional package: python -m pip install -c constraints.txt '.[slurm]'"
    unknown_choice = re.search(r"Could not find '([^']+)/([^'/]+)'", str(error))
    if unknown_choice:
        return _unknown_choice(*unknown_choice.groups(), configuration)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return one_line(" ".join([line for line in lines if not line.startswith(_NOISE)][:3]))


def _unknown_choice(group: str, choice: str, configuration: Path) -> str:
    known = sorted(path.stem for path in (configuration / group).glob("*.yaml"))
    return f"unknown {group} {choice!r}{_like(choice, known)}; known: {', '.join(known) or 'none'}"


def _unknown_key(key: str, configuration: Path, arguments: Sequence[str]) -> str:
    """What is known where `key` leaves the configuration; empty where it does not."""
    node, parents = _composed(configuration, arguments), []
    for part in key.split("."):
        if isinstance(node, list) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
        elif isinstance(node, dict) and part in node:
            node = node[part]
        else:
            break
        parents.append(part)
    if ".".join(parents) == key:
        return ""
    where = ".".join(parents) or "the configuration"
    if isinstance(node, list):
        return f"unknown key {key!r}: {where} has {len(node)} entries, numbered from 0"
    if not isinstance(node, dict):
        return f"unknown key {key!r}: {where} is one value and has no parts"
    wrong = key.split(".")[len(parents)]
    return f"unknown key {key!r}{_like(wrong, list(node))}; known in {where}: {', '.join(map(str, node))}"


def _like(wrong: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(wrong, known, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _composed(configuration: Path, arguments: Sequence[str]) -> Any:
    """The configuration as it is with the groups that `arguments` choose, the first of each in a sweep; plain data."""
    chosen = []
    for argument in arguments:
        group, _, choice = argument.partition("=")
        first = choice.split(",")[0]
        if (configuration / group / f"{first}.yaml").is_file():
            chosen.append(f"{group}={first}")
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(configuration), version_base="1.3"):
            return OmegaConf.to_container(hydra.compose("bench", chosen))
    except (HydraException, OmegaConfBaseException):
        return {}
