"""The environment variables that start a process on a null device."""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from whichlora_estimators.errors import BadValue, UnknownName, Unsupported, nearest

from .answers import ROUTINGS
from .compiler import LIBRARY, build

if TYPE_CHECKING:
    from whichlora_estimators.gpus import Gpu

_SITE = Path(__file__).parent / "site"
_NO_ASYNC = "the null device does not know how much the driver's own pool reserves (cudaMallocAsync)"


def environment(
    gpu: Gpu,
    *,
    bool_read: bool = True,
    alloc_conf: str | None = None,
    context_bytes: int = 0,
    answers: bool = True,
    routing: str = "even",
    python: Path | None = None,
) -> dict[str, str]:
    """Return what to add to a process's environment so that it finds `gpu`, and no other card, on the null device.

    `bool_read` answers "are all of them …" (false: a padded batch); `alloc_conf` is PyTorch's allocator configuration;
    `context_bytes` are missing from the start, as a CUDA context's are on a real card; `answers` also tells the process
    when generation ends and how tokens spread over experts (`routing`, of answers.ROUTINGS), through a sitecustomize.

    The null device is compiled first if need be. Raises what `build` raises; Unsupported for a compute capability that
    capabilities.json lacks and for the cudaMallocAsync backend; BadValue for a context larger than the card;
    UnknownName for a routing.
    """
    if routing not in ROUTINGS:
        raise UnknownName("routing", routing, ROUTINGS)
    if not 0 <= context_bytes < gpu.total_bytes:
        raise BadValue(
            "the context does not fit the card", value=context_bytes, todo="Give bytes, fewer than the card has."
        )
    folder = build(python)
    return {
        **_preload(folder),
        **_card(gpu, context_bytes=context_bytes, bool_read=bool_read),
        **_attention(),
        **_allocator(alloc_conf),
        **(_python_hooks(routing) if answers else {}),
        "PYTHONHASHSEED": "0",  # reserved bytes then repeat: some libraries allocate in the order of a set
    }


def _preload(folder: Path) -> dict[str, str]:
    return {
        "LD_PRELOAD": _before(str(folder / LIBRARY), "LD_PRELOAD"),
        "LD_LIBRARY_PATH": _before(
            str(folder), "LD_LIBRARY_PATH"
        ),  # for who opens libcuda.so.1 or libnvidia-ml.so.1 by name
        "TRITON_LIBCUDA_PATH": str(folder),
        "CUDA_VISIBLE_DEVICES": "0",
    }


def _before(first: str, variable: str) -> str:
    rest = [path for path in os.environ.get(variable, "").split(":") if path and path != first]
    return ":".join([first, *rest])


def _card(gpu: Gpu, *, context_bytes: int, bool_read: bool) -> dict[str, str]:
    major, minor = gpu.compute_capability
    multiprocessor = _multiprocessor(f"{major}.{minor}")
    values = {
        "NAME": gpu.name,
        "TOTAL_BYTES": gpu.total_bytes,
        "CONTEXT_BYTES": context_bytes,
        "COMPUTE_CAPABILITY": f"{major}.{minor}",
        "SM_COUNT": gpu.sm_count,
        "L2_BYTES": gpu.l2_bytes or 0,
        "BLOCK_SHARED_BYTES": multiprocessor["block_shared_kib"] * 1024,
        "SM_SHARED_BYTES": multiprocessor["sm_shared_kib"] * 1024,
        "SM_THREADS": multiprocessor["sm_threads"],
        "SM_BLOCKS": multiprocessor["sm_blocks"],
        "BOOL": int(bool_read),
    }
    return {f"NULLCUDA_{name}": str(value) for name, value in values.items()}


@cache
def _capabilities() -> dict[str, dict[str, int]]:
    text = (Path(__file__).parent / "capabilities.json").read_text(encoding="utf-8")
    known: dict[str, dict[str, int]] = json.loads(text)["capabilities"]
    return known


def _multiprocessor(capability: str) -> dict[str, int]:
    known = _capabilities()
    if capability not in known:
        close = ", ".join(nearest(capability, known)) or ", ".join(known)
        raise Unsupported(
            "the null device does not know this compute capability", value=capability, todo=f"Known: {close}."
        )
    return known[capability]


def _attention() -> dict[str, str]:
    """Keep PyTorch from preferring cuDNN's attention on 9.x and 10.x, by both names that its versions have read.

    What workspace cuDNN would take is not known here; PyTorch then takes its own flash attention, as on other cards.
    """
    return {"TORCH_CUDNN_SDPA_DEPRIORITIZED": "1", "TORCH_CUDNN_SDPA_PREFERRED": "0"}


def _allocator(alloc_conf: str | None) -> dict[str, str]:
    """Return both names of PyTorch's allocator configuration, so that neither is left with what the parent had."""
    names = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
    in_force = [alloc_conf] if alloc_conf is not None else [os.environ.get(name, "") for name in names]
    if any("cudaMallocAsync" in text for text in in_force):
        raise Unsupported(
            _NO_ASYNC, value=alloc_conf or "PYTORCH_ALLOC_CONF", todo="Use backend:native, PyTorch's default."
        )
    return {} if alloc_conf is None else dict.fromkeys(names, alloc_conf)


def _python_hooks(routing: str) -> dict[str, str]:
    return {"PYTHONPATH": _before(str(_SITE), "PYTHONPATH"), "NULLCUDA_ROUTING": routing}
