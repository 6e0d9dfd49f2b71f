"""The settings of PyTorch's CUDA caching allocator that change what memory it takes.

Source: c10/core/AllocatorConfig.h and c10/cuda/CUDAAllocatorConfig.h as installed with torch 2.14.1.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from .errors import BadValue, UnknownName, Unsupported
from .units import MIB

_INTERVALS = 16  # roundup_power2_divisions has one entry per power of two, from 1 MiB to 32 GiB
_NO_ROUNDUP = (0,) * _INTERVALS
_MIN_LARGE_SEGMENT_BYTES = 10 * MIB
_VARIABLE = "PYTORCH_CUDA_ALLOC_CONF"

# Keys that torch accepts and that leave the size of every device block and segment as it is.
_WITHOUT_EFFECT = frozenset(
    {
        "backend",
        "graph_capture_record_stream_reuse",
        "pinned_free_catch_all",
        "pinned_num_register_threads",
        "pinned_reserve_segment_size_mb",
        "pinned_use_background_threads",
        "pinned_use_cuda_host_register",
        "pinned_use_hip_host_register",
        "release_lock_on_cudamalloc",
        "release_lock_on_hipmalloc",
        "throw_on_cudamalloc_oom",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class AllocatorConfig:
    """What `PYTORCH_CUDA_ALLOC_CONF` can say about device memory; the defaults are PyTorch's.

    `max_non_split_rounding_bytes` is `large_segment_bytes` where it is None. `roundup_power2_divisions` is one
    number for every size, or 16: the first for sizes below 2 MiB, the next for 2 to 4 MiB, the last from 32 GiB up.
    """

    expandable_segments: bool = False
    max_split_size_bytes: int | None = None
    max_non_split_rounding_bytes: int | None = None
    garbage_collection_threshold: float = 0
    roundup_power2_divisions: int | tuple[int, ...] = 0
    large_segment_bytes: int = 20 * MIB
    per_process_memory_fraction: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what PyTorch refuses; `BadValue` names the setting."""
        _need(self.large_segment_bytes > _MIN_LARGE_SEGMENT_BYTES, "large_segment_size_mb", self.large_segment_bytes)
        for name, size_bytes in (
            ("max_split_size_mb", self.max_split_size_bytes),
            ("max_non_split_rounding_mb", self.max_non_split_rounding_bytes),
        ):
            _need(size_bytes is None or size_bytes >= self.large_segment_bytes, name, size_bytes)
        threshold, fraction = self.garbage_collection_threshold, self.per_process_memory_fraction
        _need(0 <= threshold < 1, "garbage_collection_threshold", threshold)
        _need(0 <= fraction <= 1, "per_process_memory_fraction", fraction)
        table = self.roundup_table
        _need(len(table) == _INTERVALS, "roundup_power2_divisions", table)
        _need(all(n >= 0 and n & (n - 1) == 0 for n in table), "roundup_power2_divisions", table)
        # the driver maps whole pages of 2 MiB and nothing less
        whole = self.large_segment_bytes % (2 * MIB) == 0
        _need(whole or not self.expandable_segments, "large_segment_size_mb", self.large_segment_bytes)

    @property
    def roundup_table(self) -> tuple[int, ...]:
        """Divisions for each of the 16 intervals of sizes, from below 2 MiB to 32 GiB and above."""
        divisions = self.roundup_power2_divisions
        return (divisions,) * _INTERVALS if isinstance(divisions, int) else divisions

    @classmethod
    def from_env(cls, text: str) -> AllocatorConfig:
        """Read the value of `PYTORCH_CUDA_ALLOC_CONF`.

        UnknownName for a key that torch 2.14 does not know, BadValue for a value that it refuses, Unsupported for
        another allocator. Stricter than torch, which reads past a missing colon and ignores what follows a number.
        """
        fields: dict[str, object] = {}
        for key, value in _pairs(text):
            if key in _READERS:
                name, read = _READERS[key]
                fields[name] = read(key, value)
            elif key not in _WITHOUT_EFFECT:
                raise UnknownName(f"key in {_VARIABLE}", key, [*_READERS, *sorted(_WITHOUT_EFFECT)])
            elif (key, value) in _REFUSED:
                raise Unsupported(_REFUSED[key, value], value=f"{key}:{value}", todo=f"Take it out of {_VARIABLE}.")
        return cls(**fields)  # type: ignore[arg-type]


_RULES = {
    "large_segment_size_mb": "must be more than 10 MiB, and whole pages of 2 MiB with expandable segments",
    "max_split_size_mb": "must be at least the large segment size (20 MiB unless set)",
    "max_non_split_rounding_mb": "must be at least the large segment size (20 MiB unless set)",
    "garbage_collection_threshold": "must lie between 0 and 1",
    "per_process_memory_fraction": "must lie between 0 and 1",
    "roundup_power2_divisions": "must be powers of two, one number or a list by size in MiB: [256:1,512:2,>:8]",
    "expandable_segments": "must be True or False",
}
_REFUSED = {
    ("backend", "cudaMallocAsync"): "cudaMallocAsync is CUDA's own allocator and is not modelled",
    ("throw_on_cudamalloc_oom", "True"): "refusing allocations before CUDA does is not modelled",
}


def _need(holds: bool, key: str, value: object) -> None:
    if not holds:
        raise BadValue(f"bad {key} in {_VARIABLE}", value=value, todo=f"It {_RULES[key]}.")


def _pairs(text: str) -> Iterator[tuple[str, str]]:
    """Yield `key, value` of `key:value,key:[a:b,c:d]`; white space means nothing anywhere."""
    rest = re.sub(r"\s", "", text).removesuffix(",")
    while rest:
        match = re.match(r"([^,:\[\]]+):(\[[^\[\]]*\]|[^,:\[\]]+)(?:,|$)", rest)
        if match is None:
            raise BadValue(f"cannot read {_VARIABLE}", value=rest, todo="Write key:value,key:value without quotes.")
        yield match[1], match[2]
        rest = rest[match.end() :]


def _read_bool(key: str, value: str) -> bool:
    _need(value in {"True", "False"}, key, value)
    return value == "True"


def _read_mib(key: str, value: str) -> int:
    _need(value.isdecimal(), key, value)
    return int(value) * MIB


def _read_float(key: str, value: str) -> float:
    _need(re.fullmatch(r"[0-9]*\.?[0-9]+", value) is not None, key, value)
    return float(value)


def _read_threshold(key: str, value: str) -> float:
    threshold = _read_float(key, value)
    _need(threshold > 0, key, value)
    return threshold


def _read_divisions(key: str, value: str) -> int | tuple[int, ...]:
    """Read `8`, or `[256:1,512:2,>:8]`: sizes from 256 MiB, from 512 MiB, and from there on.

    As torch does: below the first size its divisions hold too, and sizes left out between two keep none.
    """
    if not value.startswith("["):
        _need(value.isdecimal() and value != "0", key, value)
        return int(value)
    table, index, first = list(_NO_ROUNDUP), 0, True
    for item in value[1:-1].split(",") if value != "[]" else []:
        bound, _, divisions = item.partition(":")
        _need(divisions.isdecimal() and (bound == ">" or bound.isdecimal()), key, value)
        if bound == ">":
            table[index + 1 :] = [int(divisions)] * (_INTERVALS - index - 1)
            continue
        _need(int(bound).bit_count() == 1, key, value)
        index = min(int(bound).bit_length() - 1, _INTERVALS - 1)
        table[0 if first else index : index + 1] = [int(divisions)] * (index + 1 if first else 1)
        first = False
    return tuple(table)


_READERS = {
    "expandable_segments": ("expandable_segments", _read_bool),
    "max_split_size_mb": ("max_split_size_bytes", _read_mib),
    "max_non_split_rounding_mb": ("max_non_split_rounding_bytes", _read_mib),
    "garbage_collection_threshold": ("garbage_collection_threshold", _read_threshold),
    "roundup_power2_divisions": ("roundup_power2_divisions", _read_divisions),
    "large_segment_size_mb": ("large_segment_bytes", _read_mib),
    "per_process_memory_fraction": ("per_process_memory_fraction", _read_float),
}
