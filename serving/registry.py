"""Systems by name. The only place where `serving` (and through it the runner) learns which systems exist.

A system is a class in its own package and a frozen dataclass of its options; both are imported when first asked for, so
that `serving` depends on no system.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import types
import typing
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
_IN_WORDS = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    Mapping: "a mapping",
    types.NoneType: "null",
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
    hints = typing.get_type_hints(options_class)
    for key, value in options.items():
        _require_kind(key, value, hints[key])
    try:
        return options_class(**options)
    except TypeError as error:
        raise UserError(f"system {system!r}: {error}") from None


def _require_kind(name: str, value: Any, hint: Any) -> None:
    """Raises UserError for a value of a kind that the option never has."""
    if hint is Any:
        return
    kinds = set(typing.get_args(hint)) if isinstance(hint, types.UnionType) else {typing.get_origin(hint) or hint}
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and (isinstance(value, int) and int in kinds or math.isfinite(value) and float in kinds):
        return
    if not number and isinstance(value, tuple(kinds - {int, float})):
        if typing.get_origin(hint) is Mapping:
            for key, inner in value.items():
                _require_kind(f"{name} of {key}", inner, typing.get_args(hint)[1])
        return
    words = " or ".join(said for kind, said in _IN_WORDS.items() if kind in kinds)
    raise UserError(f"option {name} is {value!r}; it must be {words}")


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
