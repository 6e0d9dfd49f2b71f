"""Fine-tuning methods: one file each, found by name."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from ..errors import UnknownName
from .base import METHODS, Method


@cache
def _load_all() -> None:
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")


def find_method(name: str) -> Method:
    """Return a method by name; UnknownName with the nearest otherwise."""
    _load_all()
    try:
        return METHODS[name]
    except KeyError:
        raise UnknownName("method", name, METHODS, todo=f"Methods: {', '.join(sorted(METHODS))}.") from None


def all_methods() -> dict[str, Method]:
    """Return every method by name."""
    _load_all()
    return dict(METHODS)
