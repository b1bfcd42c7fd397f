"""Finds an operator's CUDA form without importing Triton on machines that have none."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType


@functools.cache
def cuda_form(package: str) -> ModuleType:
    """The Triton module of the operator in `package` (its `__name__`), imported on first use."""
    return importlib.import_module(f"{package}.triton")
