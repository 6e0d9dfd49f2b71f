"""GPUs: what PyTorch finds on each card, and finding a card by any name that people and tools give it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from .errors import BadValue, UnknownName, WhichloraError
from .units import GIB, parse_bytes

_DATA = Path(__file__).with_name("data")
_DTYPES = ("bf16", "fp16", "tf32", "fp32")


class AmbiguousName(WhichloraError):
    """A name that fits several GPUs; `candidates` holds their slugs."""

    def __init__(self, name: str, candidates: Iterable[str]) -> None:
        self.candidates = tuple(sorted(candidates))
        more = len(self.candidates) - 12
        shown = ", ".join(self.candidates[:12]) + (f" and {more} more" if more > 0 else "")
        super().__init__("several GPUs go by this name", value=name, todo=f"Say which: {shown}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class MatmulRates:
    """Dense FLOP/s of matrix products with fp32 accumulation, by dtype; None where no tensor core multiplies it."""

    bf16: float | None
    fp16: float | None
    tf32: float | None
    fp32: float

    def for_dtype(self, dtype: str) -> float:
        """Return FLOP/s for `dtype`; what no tensor core multiplies (bf16 before Ampere) counts at the fp32 rate.

        Raises UnknownName for a dtype other than bf16, fp16, tf32 and fp32.
        """
        if dtype not in _DTYPES:
            raise UnknownName("dtype of a matrix product", dtype, _DTYPES)
        rate: float | None = getattr(self, dtype)
        return self.fp32 if rate is None else rate


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One kind of card. `total_bytes` is what PyTorch reports under Linux, less than the nominal memory.

    `hbm_bytes_per_s` is the bandwidth of the device memory whatever its technology; `memory_basis` is "reported" for
    this card, "rule" (the share of the nominal size that a similar card reports) or "given" by the user.
    """

    slug: str
    name: str
    aliases: tuple[str, ...]
    shared_names: tuple[str, ...]
    architecture: str
    compute_capability: tuple[int, int]
    segment: str
    sm_count: int
    nominal_gb: float
    total_bytes: int
    memory_basis: str
    memory_source: str
    hbm_bytes_per_s: float
    matmul_flops_per_s: MatmulRates
    l2_bytes: int | None
    power_w: float | None
    source: str
    as_of: str

    @property
    def has_bf16(self) -> bool:
        """Whether tensor cores multiply bf16; without them it still computes, at the fp32 rate at best."""
        return self.matmul_flops_per_s.bf16 is not None


@cache
def _document(file_name: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((_DATA / file_name).read_text(encoding="utf-8"))
    return document


def _from_record(slug: str, record: Mapping[str, Any]) -> Gpu:
    major, minor = record["compute_capability"].split(".")
    power_w = record["power_w"]
    return Gpu(
        slug=slug,
        name=record["name"],
        aliases=tuple(record["aliases"]),
        shared_names=tuple(record["shared_names"]),
        architecture=record["architecture"],
        compute_capability=(int(major), int(minor)),
        segment=record["segment"],
        sm_count=record["sm_count"],
        nominal_gb=float(record["nominal_gb"]),
        total_bytes=record["total_bytes"],
        memory_basis=record["memory_basis"],
        memory_source=record["memory_source"],
        hbm_bytes_per_s=float(record["hbm_bytes_per_s"]),
        matmul_flops_per_s=_rates(record["matmul_flops_per_s"]),
        l2_bytes=record["l2_bytes"],
        power_w=None if power_w is None else float(power_w),
        source=record["source"],
        as_of=record["as_of"],
    )


def _rates(by_dtype: Mapping[str, float | None]) -> MatmulRates:
    rates = {dtype: None if rate is None else float(rate) for dtype, rate in by_dtype.items()}
    fp32 = rates["fp32"]
    assert fp32 is not None
    return MatmulRates(bf16=rates.get("bf16"), fp16=rates.get("fp16"), tf32=rates.get("tf32"), fp32=fp32)


@cache
def all_gpus() -> tuple[Gpu, ...]:
    """Return every card of `data/gpus.json`, in its order (oldest architecture first)."""
    return tuple(_from_record(slug, record) for slug, record in _document("gpus.json")["cards"].items())


# --- names: a spelling becomes tokens, tokens become a key ---

_NOISE = frozenset({"nvidia", "geforce", "tesla", "gpu", "graphics", "card", "corporation", "generation", "edition"})
_REWRITES = (
    (re.compile(r"\((?:r|tm)\)|[®™]"), " "),
    (re.compile(r"[^a-z0-9]+"), " "),
    (re.compile(r"\bpci e\b"), "pcie"),
    (re.compile(r"\bmax q\b"), "maxq"),
    (re.compile(r"\b(?:mobile|notebook)\b"), "laptop"),
    (re.compile(r"\bsxm\d\b"), "sxm"),  # A100-SXM4, H100 SXM5: the socket says nothing that the model does not
    (re.compile(r"\b(\d+) ?gi?b?\b"), r"\1gb"),
)
_MEMORY = re.compile(r"(\d+)gb")
_MEMORY_TECHNOLOGY = re.compile(r"hbm\d?e?|gddr\d?x?")


def _tokens(text: str) -> list[str]:
    text = text.lower()
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    return [token for token in text.split() if token not in _NOISE]


def _key(tokens: Iterable[str]) -> str:
    """Join tokens; 'RTX' in front says nothing, since the numbers of Quadro, Ada and PRO keep their own words."""
    key = "".join(tokens)
    return key.removeprefix("rtx") or key


def _without_memory(tokens: Iterable[str]) -> list[str]:
    return [token for token in tokens if not _MEMORY.fullmatch(token)]


@cache
def _names() -> tuple[dict[str, set[str]], dict[str, set[str]]]:
    """Return slugs by whole key, and by key without memory sizes."""
    whole: dict[str, set[str]] = {}
    stems: dict[str, set[str]] = {}
    for gpu in all_gpus():
        for spelling in (gpu.slug, gpu.name, *gpu.aliases, *gpu.shared_names):
            tokens = _tokens(spelling)
            whole.setdefault(_key(tokens), set()).add(gpu.slug)
            stems.setdefault(_key(_without_memory(tokens)), set()).add(gpu.slug)
    return whole, stems


def _matches(tokens: list[str]) -> list[Gpu]:
    whole, stems = _names()
    by_slug = {gpu.slug: gpu for gpu in all_gpus()}
    if exact := whole.get(_key(tokens)):
        return [by_slug[slug] for slug in exact]
    fitting = [by_slug[slug] for slug in stems.get(_key(_without_memory(tokens)), ())]
    sizes = {float(match[1]) for token in tokens if (match := _MEMORY.fullmatch(token))}
    return [gpu for gpu in fitting if not sizes or sizes == {gpu.nominal_gb}]


def _candidates(name: str) -> list[Gpu]:
    """Return the cards that `name` may mean: as spelled, then without the words that only describe."""
    cut = re.fullmatch(r"(.{6,}?) ?(?:\.\.\.|…)", name.strip().lower())
    if cut:  # nvidia-smi cuts long names: "NVIDIA RTX 6000 Ada Gene..."
        return [gpu for gpu in all_gpus() if gpu.name.lower().startswith(cut[1])]
    tokens = _tokens(name)
    plain = [token for token in tokens if token != "quadro" and not _MEMORY_TECHNOLOGY.fullmatch(token)]
    return _matches(tokens) or (_matches(plain) if plain else [])


def find_gpu(name: str, *, reported_bytes: int | None = None) -> Gpu:
    """Return the card that `name` means: a slug, a torch or nvidia-smi name, a Slurm gres type or a usual short form.

    `reported_bytes`, the total memory that the device reports, tells cards of one name apart (RTX 4060 Ti: 8 or 16 GB).
    Raises AmbiguousName where several cards fit, UnknownName with the nearest slugs where none does.
    """
    by_slug = {gpu.slug: gpu for gpu in all_gpus()}
    if gpu := by_slug.get(name.strip().lower()):
        return gpu
    fitting = _candidates(name)
    if reported_bytes is not None and len(fitting) > 1:
        # drivers and ECC move the total by some percent, sizes of one name differ by 20% and more
        fitting = [gpu for gpu in fitting if abs(gpu.total_bytes / reported_bytes - 1) < 0.09] or fitting
    if not fitting:
        todo = "Or describe the card by its fields: name, total_bytes, hbm_bytes_per_s, matmul_flops_per_s …"
        raise UnknownName("GPU", name, by_slug, todo=todo)
    if len(fitting) > 1:
        raise AmbiguousName(name, (gpu.slug for gpu in fitting))
    return fitting[0]


def search_gpus(text: str) -> tuple[Gpu, ...]:
    """Return the cards that have, for every word of `text`, a word in name, architecture or segment that begins so."""
    wanted = _words(text)
    return tuple(gpu for gpu in all_gpus() if all(_begins(word, _described(gpu)) for word in wanted))


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def _begins(word: str, words: Iterable[str]) -> bool:
    return any(other.startswith(word) for other in words)


def _described(gpu: Gpu) -> list[str]:
    major, minor = gpu.compute_capability
    spelled = (gpu.slug, gpu.name, *gpu.aliases, *gpu.shared_names, gpu.architecture, gpu.segment)
    return [*_words(" ".join(spelled)), f"sm{major}{minor}"]


# --- a card that a user describes ---

_REQUIRED = ("name", "compute_capability", "sm_count", "total_bytes", "hbm_bytes_per_s", "matmul_flops_per_s")
_OPTIONAL = ("slug", "architecture", "segment", "l2_bytes", "power_w", "source")
# Wide enough for any card of the last ten years and the next few; narrow enough to catch a wrong unit.
_RANGES = {
    "sm_count": (1, 1024),
    "total_bytes": (GIB, 4096 * GIB),
    "hbm_bytes_per_s": (1e10, 1e14),
    "matmul_flops_per_s": (1e11, 1e17),
    "l2_bytes": (2**16, 2**32),
    "power_w": (1, 10_000),
}


def gpu_from_fields(fields: Mapping[str, object]) -> Gpu:
    """Return a custom card from the fields of a YAML or JSON mapping; bytes may be text ("24GB", "1008GB/s").

    Needs name, compute_capability, sm_count, total_bytes (as PyTorch reports it), hbm_bytes_per_s and
    matmul_flops_per_s ({"fp32": …, "bf16": …}); takes slug, architecture, segment, l2_bytes, power_w, source.
    Raises BadValue for anything else.
    """
    _check_keys(fields, _REQUIRED, _OPTIONAL, "a custom GPU")
    name = _text(fields, "name")
    capability = _compute_capability(fields["compute_capability"])
    alike = [gpu.architecture for gpu in all_gpus() if gpu.compute_capability == capability]
    total_bytes = int(_number(fields, "total_bytes"))
    return Gpu(
        slug=_text(fields, "slug", "-".join(_words(name)) or "custom"),
        name=name,
        aliases=(),
        shared_names=(),
        architecture=_text(fields, "architecture", alike[0] if alike else "unknown"),
        compute_capability=capability,
        segment=_text(fields, "segment", "custom"),
        sm_count=int(_number(fields, "sm_count")),
        nominal_gb=total_bytes / GIB,
        total_bytes=total_bytes,
        memory_basis="given",
        memory_source="given by the user",
        hbm_bytes_per_s=_number(fields, "hbm_bytes_per_s"),
        matmul_flops_per_s=_custom_rates(fields["matmul_flops_per_s"], capability),
        l2_bytes=int(_number(fields, "l2_bytes")) if fields.get("l2_bytes") is not None else None,
        power_w=_number(fields, "power_w") if fields.get("power_w") is not None else None,
        source=_text(fields, "source", "given by the user"),
        as_of="given by the user",
    )


def _check_keys(fields: Mapping[str, object], required: Iterable[str], optional: Iterable[str], what: str) -> None:
    known = (*required, *optional)
    missing = [key for key in required if fields.get(key) is None]
    if missing:
        raise BadValue(f"{what} lacks fields", value=missing, todo=f"Give {', '.join(required)}.")
    unknown = [key for key in fields if key not in known]
    if unknown:
        raise BadValue(f"{what} has unknown fields", value=unknown, todo=f"Known fields: {', '.join(known)}.")


def _text(fields: Mapping[str, object], key: str, default: str = "") -> str:
    value = fields.get(key) if fields.get(key) is not None else default
    if not isinstance(value, str) or not value.strip():
        raise BadValue(f"{key} of a custom GPU is not a text", value=value, todo="Write some words.")
    return value.strip()


def _number(fields: Mapping[str, object], key: str, kind: str = "") -> float:
    """Return the field as a number within the range of its kind (its own name unless said)."""
    value = fields[key]
    if isinstance(value, str) and key in ("total_bytes", "l2_bytes", "hbm_bytes_per_s"):
        value = parse_bytes(value.strip().removesuffix("/s"))
    low, high = _RANGES[kind or key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise BadValue(f"{key} of a custom GPU is not a number", value=value, todo=f"Give {low:g} to {high:g}.")
    if not low <= value <= high:
        raise BadValue(f"{key} of a custom GPU is out of range", value=value, todo=f"Give {low:g} to {high:g}.")
    if key in ("sm_count", "total_bytes", "l2_bytes") and value != int(value):
        raise BadValue(f"{key} of a custom GPU is not whole", value=value, todo="Give a whole number.")
    return value


def _compute_capability(value: object) -> tuple[int, int]:
    known: dict[str, int] = _document("cuda_context.json")["threads_per_sm"]
    text = ".".join(str(part) for part in value) if isinstance(value, list | tuple) else str(value)
    if text not in known:
        todo = f"Give one of {', '.join(known)}."
        raise BadValue("not a compute capability that is known", value=value, todo=todo)
    major, minor = text.split(".")
    return int(major), int(minor)


def _custom_rates(value: object, capability: tuple[int, int]) -> MatmulRates:
    if not isinstance(value, Mapping):
        todo = 'Give FLOP/s by dtype: {"fp32": 82.6e12, "bf16": 165.2e12}.'
        raise BadValue("matmul_flops_per_s of a custom GPU is not a mapping", value=value, todo=todo)
    _check_keys(value, ("fp32",), _DTYPES[:3], "matmul_flops_per_s of a custom GPU")
    given = {dtype: _number(value, dtype, "matmul_flops_per_s") for dtype in value if value[dtype] is not None}
    if capability < (8, 0) and ("bf16" in given or "tf32" in given):
        todo = "Leave bf16 and tf32 out: there they are computed at the fp32 rate."
        raise BadValue(
            "no tensor cores multiply bf16 or tf32 before compute capability 8.0", value=dict(value), todo=todo
        )
    return _rates(given)


# --- beside what PyTorch reserves ---


def context_bytes(gpu: Gpu) -> int:
    """Return bytes that a process holds on `gpu` beside PyTorch's reserved memory: context, kernel images, handles.

    A least-squares line over the threads that the card can hold (SMs x threads per SM), through readings from Volta to
    Blackwell that `data/cuda_context.json` lists with their sources: process memory as NVML gives it at PyTorch's
    out-of-memory errors, less allocated and reserved. Held-out cards miss by 34 MiB in the mean, 103 MiB at most.
    Not counted: NCCL, libraries that allocate on their own, and what the driver keeps for itself, which device-wide
    figures of nvidia-smi include.
    """
    facts = _document("cuda_context.json")
    major, minor = gpu.compute_capability
    threads = gpu.sm_count * facts["threads_per_sm"][f"{major}.{minor}"]
    return int(facts["base_bytes"] + facts["bytes_per_thread"] * threads)
