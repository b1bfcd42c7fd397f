"""Fitted coefficients as small JSON files with their provenance: what a fit wrote and what predictions read."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from serving.cost.fit import Fitted
from serving.errors import UserError

FITTED_DIRECTORY = Path(__file__).resolve().parent / "fitted"


@dataclass(frozen=True)
class FittedSet:
    """All fitted variants of one card, and where they come from."""

    card: str
    variants: Mapping[tuple[str, str], Fitted]  # (operator, variant) -> coefficients
    provenance: Mapping[str, object]

    def coefficients(self, operator: str) -> dict[str, Mapping[str, float]]:
        """Coefficients of `operator` by variant."""
        return {variant: fit.coefficients for (name, variant), fit in self.variants.items() if name == operator}

    def operators(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for name, _ in self.variants))

    def write(self, path: Path) -> None:
        """Write to `path`, whole or not at all."""
        entries = [asdict(fit) for fit in self.variants.values()]
        text = json.dumps({"card": self.card, "provenance": self.provenance, "fits": entries}, indent=1)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(text + "\n")
        partial.replace(path)


def fitted_set(card: str, fits: Iterable[Fitted], provenance: Mapping[str, object]) -> FittedSet:
    """A set from freshly fitted variants."""
    return FittedSet(card, {(fit.operator, fit.variant): fit for fit in fits}, provenance)


def read_fitted(path: Path) -> FittedSet:
    """The set in `path`. Raises :class:`UserError` when it cannot be read."""
    try:
        content = json.loads(path.read_text())
        fits = [Fitted(**entry) for entry in content["fits"]]
        return fitted_set(content["card"], fits, content["provenance"])
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; `python -m serving.cost fit` writes it") from None
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a file of fitted coefficients ({error!r})") from None


@functools.cache
def shipped(card: str) -> FittedSet:
    """The set shipped for `card`. Raises :class:`UserError` listing the cards that have one."""
    known = sorted(path.stem for path in FITTED_DIRECTORY.glob("*.json"))
    if card not in known:
        raise UserError(f"no fitted coefficients for {card!r}; known: {', '.join(known)}")
    return read_fitted(FITTED_DIRECTORY / f"{card}.json")
