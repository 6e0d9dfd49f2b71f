"""Steer and read the null device from inside the process that runs on it.

Only the standard library: environments that lack the rest of this package load this file as whichlora_null.control.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from functools import cache

_SIZES = ("used", "peak", "managed_used", "managed_peak", "pinned_used", "pinned_peak")


@cache
def _device() -> ctypes.CDLL | None:
    process = ctypes.CDLL(None)
    if not hasattr(process, "nullcuda_used"):
        return None
    for name in _SIZES:
        getattr(process, f"nullcuda_{name}").restype = ctypes.c_size_t
    process.nullcuda_launches.restype = ctypes.c_ulonglong
    process.nullcuda_device_s.restype = ctypes.c_double
    process.nullcuda_work.argtypes = (ctypes.c_double, ctypes.c_double)
    process.nullcuda_work.restype = None
    process.nullcuda_wait_takes.argtypes = (ctypes.c_double,)
    process.nullcuda_wait_takes.restype = None
    process.nullcuda_last_missing.restype = ctypes.c_char_p
    return process


def _here() -> ctypes.CDLL:
    device = _device()
    if device is None:
        raise RuntimeError(
            "this process does not run on a null device: start it with whichlora.nulldevice.environment()"
        )
    return device


def is_null_device() -> bool:
    """Say whether this process's CUDA is the null device."""
    return _device() is not None


def used_bytes() -> int:
    """Return device memory in use now, in bytes as the driver hands it out (2 MiB at a time): what PyTorch reserved."""
    return int(_here().nullcuda_used())


def peak_bytes() -> int:
    """Return the most device memory that was in use, in bytes, since the start or the last `reset`."""
    return int(_here().nullcuda_peak())


def managed_bytes() -> int:
    """Return managed memory in use now, in bytes: paged optimizer state, which may exceed the card and counts apart."""
    return int(_here().nullcuda_managed_used())


def managed_peak_bytes() -> int:
    """Return the most managed memory that was in use, in bytes, since the start or the last `reset`."""
    return int(_here().nullcuda_managed_peak())


def pinned_bytes() -> int:
    """Return pinned host memory in use now, in bytes."""
    return int(_here().nullcuda_pinned_used())


def pinned_peak_bytes() -> int:
    """Return the most pinned host memory that was in use, in bytes, since the start or the last `reset`."""
    return int(_here().nullcuda_pinned_peak())


def launches() -> int:
    """Return how many kernels, matrix products, copies and fills were launched on the card since the start."""
    return int(_here().nullcuda_launches())


def wait_takes(seconds: float) -> None:
    """Say what it takes the host, each time that it waits for the card, to hear that the card is done."""
    _here().nullcuda_wait_takes(seconds)


def work(host_s: float, device_s: float) -> None:
    """Lay work on the card's two lanes: the host issues it for `host_s`, then the card executes it for `device_s`.

    From the first call on, CUDA events tell the time of these lanes.
    """
    _here().nullcuda_work(host_s, device_s)


def device_s() -> float:
    """Return when the card has executed all that was laid so far, in seconds since the start."""
    return float(_here().nullcuda_device_s())


def reset() -> None:
    """Begin new peaks at what is in use now, and forget queued answers and which call was not implemented."""
    _here().nullcuda_reset_peaks()
    _here().nullcuda_forget_answers()
    _here().nullcuda_forget_missing()


def set_bool(value: bool) -> None:
    """Answer "are all of them …" with this from now on: true for a batch without padding, false with."""
    _here().nullcuda_set_bool(int(value))


def answer_bool(value: bool) -> None:
    """Answer the next bool that is read back with this, whatever was asked."""
    _here().nullcuda_answer_bool(int(value))


def answer_counts(counts: Iterable[int]) -> None:
    """Answer the next questions of how many elements are not zero with these, in order; earlier ones are forgotten."""
    values = list(counts)
    if _here().nullcuda_answer_counts((ctypes.c_longlong * len(values))(*values), len(values)):
        raise ValueError(f"{len(values)} answers are more than the null device keeps")


def last_missing() -> str:
    """Return the name of the last function that was called and is not implemented, empty if there was none."""
    return bytes(_here().nullcuda_last_missing()).decode()
