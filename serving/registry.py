"""Systems by name. The only place where `serving` (and through it the runner) learns which systems exist.

A system is a class in its own package and a frozen dataclass of its options; both are imported when first asked for, so
that `serving` depends on no system.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any

from serving.errors import UserError
from serving.interface import System

# name -> module of the system, its class, its options' class (importable from there)
_SYSTEMS = {
    "crosspool": ("crosspool.engine", "CrossPool", "CrossPoolOptions"),
    "elastic": ("baselines.multiplex.system", "Elastic", "ElasticOptions"),
    "elastic-placement": ("baselines.multiplex.placement", "ElasticPlacement", "PlacementOptions"),
    "quota": ("baselines.multiplex.quota", "Quota", "QuotaOptions"),
    "static": ("baselines.static.system", "StaticPartition", "StaticOptions"),
    "swap": ("baselines.swap.system", "Swap", "SwapOptions"),
}


def names() -> tuple[str, ...]:
    """The systems that :func:`create` knows."""
    return tuple(_SYSTEMS)


def options_from_dict(options_class: type, options: Mapping[str, Any], system: str) -> Any:
    """`options_class(**options)`; raises :class:`UserError` that lists the known options for an unknown one."""
    known = {f.name: f for f in dataclasses.fields(options_class)}
    for key in options:
        if key not in known:
            raise UserError(f"system {system!r} has no option {key!r}; known: {', '.join(known)}")
    try:
        return options_class(**options)
    except TypeError as error:
        raise UserError(f"system {system!r}: {error}") from None


def all_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """All options of a system, its defaults where `options` says nothing. Raises :class:`UserError` as :func:`create`."""
    return dataclasses.asdict(options_from_dict(_classes(name)[1], options, name))


def create(name: str, options: Mapping[str, Any] | None = None) -> System:
    """A new, unstarted system. Raises :class:`UserError` for an unknown name or option."""
    system_class, options_class = _classes(name)
    return system_class(options_from_dict(options_class, options or {}, name))


def _classes(name: str) -> tuple[type, type]:
    try:
        module_name, class_name, options_name = _SYSTEMS[name]
    except KeyError:
        raise UserError(f"unknown system {name!r}; known: {', '.join(_SYSTEMS)}") from None
    module = importlib.import_module(module_name)
    return getattr(module, class_name), getattr(module, options_name)
