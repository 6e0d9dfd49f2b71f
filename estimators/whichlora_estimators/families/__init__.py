"""Model families: one recipe file each, found by the `model_type` of a config."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from ..errors import UnknownName
from .base import FAMILIES, Model


@cache
def _load_all() -> None:
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")


def find_family(model_type: str) -> type[Model]:
    """Return the recipe for a Hugging Face `model_type`; UnknownName with the nearest otherwise."""
    _load_all()
    try:
        return FAMILIES[model_type]
    except KeyError:
        todo = "whichlora predicts only architectures that it has a recipe for."
        raise UnknownName("architecture (model_type)", model_type, FAMILIES, todo=todo) from None


def all_families() -> dict[str, type[Model]]:
    """Return every recipe by `model_type`."""
    _load_all()
    return dict(FAMILIES)
