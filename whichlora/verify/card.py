"""Where a verification runs: the host, and the card that PyTorch sees, by the name that our GPU data has for it."""

from __future__ import annotations

import dataclasses

from whichlora_estimators.errors import WhichloraError
from whichlora_estimators.gpus import Gpu, find_gpu
from whichlora_profiles_db import Environment, local_environment

from .nvml import driver_version

# Drivers and ECC move a card's total by some percent; a slice of one has half of it at most.
_SAME_TOTAL = 0.1


def environment_here(device: str) -> Environment:
    """Describe this process's host and software and, on "cuda", its first card if PyTorch sees one."""
    import torch

    cuda = torch.version.cuda
    versions = {"cuda": str(cuda)} if cuda else {}
    if device != "cuda" or not torch.cuda.is_available():
        return local_environment(versions=versions)
    seen = torch.cuda.get_device_properties(0)
    capability = (seen.major, seen.minor)
    known = known_card(seen.name, total_bytes=seen.total_memory, compute_capability=capability)
    return local_environment(
        versions=versions,
        gpu=known.slug if known else None,
        gpu_name=seen.name,
        gpu_total_bytes=seen.total_memory,
        compute_capability=capability,
        driver_version=driver_version(),
    )


def known_card(name: str, *, total_bytes: int, compute_capability: tuple[int, int]) -> Gpu | None:
    """Return the card of our GPU data that has this name and about this memory, with the very bytes; None without."""
    try:
        gpu = find_gpu(name, reported_bytes=total_bytes)
    except WhichloraError:
        return None
    alike = abs(gpu.total_bytes / total_bytes - 1) < _SAME_TOTAL and gpu.compute_capability == compute_capability
    return dataclasses.replace(gpu, total_bytes=total_bytes) if alike else None
