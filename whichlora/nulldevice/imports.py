"""Patch modules of other libraries right after they were imported, whenever that is.

Only the standard library: environments that lack the rest of this package load this file as whichlora_null.imports.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType

Patch = Callable[[ModuleType], None]
_DONE = "_patched_by_whichlora"

_patches: dict[str, list[Patch]] = {}


def patch_on_import(patches: Mapping[str, Patch]) -> None:
    """Have modules patched, by name: now where they are imported already, else as soon as they are."""
    for name, patch in patches.items():
        _patches.setdefault(name, []).append(patch)
        if name in sys.modules:
            _run(sys.modules[name])
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _run(module: ModuleType) -> None:
    """Run each patch of a module once, whoever asks and under whatever name this file was loaded."""
    done: set[str] = vars(module).setdefault(_DONE, set())
    for patch in _patches[module.__name__]:
        if patch.__qualname__ not in done:
            done.add(patch.__qualname__)
            patch(module)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules to be patched as everybody else would, and has them patched right after they ran."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target) if fullname in _patches else None
        if spec and spec.loader:
            run = spec.loader.exec_module

            def run_and_patch(module: ModuleType) -> None:
                run(module)
                _run(module)

            spec.loader.exec_module = run_and_patch  # type: ignore[method-assign]
        return spec
