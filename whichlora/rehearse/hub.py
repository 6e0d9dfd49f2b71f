"""Inside a rehearsed script: models of the Hub whose weights are not in the cache are stood in for by phantoms.

Only the standard library: this file is loaded by its path in environments that do not have the rest of this package.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

HUB, MAKER = "WHICHLORA_REHEARSAL_HUB", "WHICHLORA_REHEARSAL_MAKER"
_WEIGHTS = ("*.safetensors", "*.bin", "*.gguf", "*.pt", "*.pth")
_OFF_THE_CARD = ("LD_PRELOAD", "LD_LIBRARY_PATH", "TRITON_LIBCUDA_PATH", "PYTHONPATH", "PYTHONHOME")


def patches() -> dict[str, Callable[[ModuleType], None]]:
    """Return what is to be patched, by module; nothing where stand-ins are not wanted."""
    if not os.environ.get(HUB):
        return {}
    return {
        "huggingface_hub.file_download": _patch_files,
        "huggingface_hub._snapshot_download": _patch_snapshots,
        "huggingface_hub.hf_api": _patch_api,
    }


@functools.cache
def stands_in(name: str, cache: str) -> bool:
    """Say whether a model is stood in for; the first time, look for its weights in the cache and else make a phantom."""
    hub = Path(os.environ[HUB])
    folder = f"models--{name.replace('/', '--')}"
    if (hub / folder / "refs" / "main").is_file():
        return True
    snapshots = Path(cache) / folder / "snapshots"
    if any(path.exists() for pattern in _WEIGHTS for path in snapshots.glob(f"*/{pattern}")):
        return False
    maker = json.loads(os.environ[MAKER])
    variables = {key: value for key, value in os.environ.items() if key not in _OFF_THE_CARD}
    done = subprocess.run(
        [*maker["command"], name, str(hub)],
        env={**variables, "PYTHONPATH": maker["path"], "HF_HUB_CACHE": cache},
        stdout=sys.stderr,
        check=False,
    )
    return done.returncode == 0


def _patch_files(module: ModuleType) -> None:
    for name in ("hf_hub_download", "try_to_load_from_cache"):
        setattr(module, name, _from_stand_in(getattr(module, name)))


def _patch_snapshots(module: ModuleType) -> None:
    vars(module)["snapshot_download"] = _from_stand_in(vars(module)["snapshot_download"])


def _patch_api(module: ModuleType) -> None:
    """Ask nobody about a model that is stood in for: what is known of it lies in the cache."""
    for name in ("file_exists", "list_repo_files", "list_repo_tree", "model_info", "repo_exists", "repo_info"):
        setattr(module.HfApi, name, _offline(getattr(module.HfApi, name)))
        if hasattr(module, name):  # functions of the package are methods that were bound when it was imported
            setattr(module, name, getattr(module.api, name))


def _from_stand_in(look_up: Callable[..., Any]) -> Callable[..., Any]:
    """Have a function that looks for a model's files look where its stand-in lies, and only there."""
    names = tuple(inspect.signature(look_up).parameters)

    @functools.wraps(look_up)
    def found(*args: Any, **kwargs: Any) -> Any:
        from huggingface_hub import constants

        asked = {**dict(zip(names, args)), **kwargs}  # noqa: B905  (keywords that no signature has are taken too)
        cache = str(asked.get("cache_dir") or constants.HF_HUB_CACHE)
        if asked.get("local_dir") or not _is_standing_in(asked, cache):
            return look_up(*args, **kwargs)
        changed = {"revision": None, "force_download": False, "cache_dir": os.environ[HUB], "local_files_only": True}
        asked |= {name: value for name, value in changed.items() if name in names}
        return look_up(**asked)

    return found


def _offline(ask: Callable[..., Any]) -> Callable[..., Any]:
    names = tuple(inspect.signature(ask).parameters)

    @functools.wraps(ask)
    def asked_offline(*args: Any, **kwargs: Any) -> Any:
        from huggingface_hub import constants, errors

        asked = {**dict(zip(names, args)), **kwargs}  # noqa: B905  (keywords that no signature has are taken too)
        if _is_standing_in(asked, str(constants.HF_HUB_CACHE)):
            raise errors.OfflineModeIsEnabled(f"{asked['repo_id']} is stood in for in this rehearsal")
        return ask(*args, **kwargs)

    return asked_offline


def _is_standing_in(asked: dict[str, Any], cache: str) -> bool:
    name = asked.get("repo_id")
    return isinstance(name, str) and asked.get("repo_type") in (None, "model") and stands_in(name, cache)
