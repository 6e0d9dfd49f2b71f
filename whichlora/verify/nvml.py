"""What NVIDIA's management library says: the bytes that this process holds on a card, and the driver's version.

It needs the package nvidia-ml-py. Without it, or where the driver does not tell, nothing is known.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from importlib import import_module
from typing import Any, TypeVar

T = TypeVar("T")


class ProcessBytes:
    """Finds this process among those that NVML lists on a card; made before the process uses any card.

    In a container NVML lists processes by ids that only the host knows. Then the process is the one that has come since.
    """

    def __init__(self) -> None:
        self._pynvml = _library()
        self._there_before = set(_known(self._pynvml, self._all_ids) or ())

    def read(self, uuid: str) -> int | None:
        """Return the bytes that this process holds on the card of this UUID, context included; None where unknown."""
        listed = _known(self._pynvml, lambda nvml: self._listed(nvml, uuid)) or {}
        own = os.getpid()
        new = set(listed) - self._there_before
        found = own if own in listed else new.pop() if len(new) == 1 else None
        return None if found is None else listed[found]

    def _listed(self, nvml: Any, uuid: str) -> dict[int, int | None]:
        name = uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
        card = nvml.nvmlDeviceGetHandleByUUID(name)
        return {each.pid: each.usedGpuMemory for each in nvml.nvmlDeviceGetComputeRunningProcesses(card)}

    def _all_ids(self, nvml: Any) -> set[int]:
        cards = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
        return {each.pid for card in cards for each in nvml.nvmlDeviceGetComputeRunningProcesses(card)}


def driver_version() -> str | None:
    """Return the version of NVIDIA's driver; None where unknown."""
    version = _known(_library(), lambda nvml: nvml.nvmlSystemGetDriverVersion())
    return version.decode() if isinstance(version, bytes) else version


def _library() -> Any:
    """Return pynvml, ready for use, or None."""
    with contextlib.suppress(ImportError):
        pynvml: Any = import_module("pynvml")
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlInit()
            return pynvml
    return None


def _known(pynvml: Any, ask: Callable[[Any], T]) -> T | None:
    """Ask the library; None for what it does not say."""
    if pynvml is None:
        return None
    try:
        return ask(pynvml)
    except pynvml.NVMLError:
        return None
