"""Where a measurement was made: card, host, and the version of everything that ran."""

from __future__ import annotations

import dataclasses
import getpass
import platform
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from whichlora_estimators.errors import BadValue

from .checks import check_count, check_text, known_keys, sorted_mapping

# Names that say who and where; they stay out of the identity, and out of what a lab hands on.
PRIVATE = ("host_name", "user_name")

LIBRARIES = (
    "accelerate",
    "bitsandbytes",
    "datasets",
    "flash-attn",
    "liger-kernel",
    "peft",
    "safetensors",
    "tokenizers",
    "torch",
    "transformers",
    "triton",
    "trl",
)

_TEXTS = ("gpu", "gpu_name", "driver_version", "host_name", "cpu_name", "user_name", "os_name", "python_version")


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """Card, host and software of a measurement; None where unknown.

    `gpu` is the slug of our GPU data and `gpu_name` what the driver calls the card; on the null device both name the
    card that it plays. `versions` maps library names ("torch", "cuda", "peft") to versions.
    """

    gpu: str | None = None
    gpu_name: str | None = None
    gpu_total_bytes: int | None = None
    compute_capability: tuple[int, int] | None = None
    driver_version: str | None = None
    host_name: str | None = None
    cpu_name: str | None = None
    user_name: str | None = None
    os_name: str | None = None
    python_version: str | None = None
    whichlora_version: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in (*_TEXTS, "whichlora_version"):
            check_text(name, getattr(self, name))
        check_count("gpu_total_bytes", self.gpu_total_bytes)
        object.__setattr__(self, "compute_capability", _capability(self.compute_capability))
        versions = sorted_mapping("versions", self.versions)
        for library, version in versions.items():
            if not isinstance(version, str) or not version:
                todo = "Leave out libraries whose version is unknown."
                raise BadValue(f"version of {library} must be text", value=version, todo=todo)
        object.__setattr__(self, "versions", versions)

    def __hash__(self) -> int:
        return hash((self.gpu, self.host_name, tuple(self.versions.items())))

    def without_names(self) -> Environment:
        """Return a copy that does not say who and where."""
        return dataclasses.replace(self, host_name=None, user_name=None)


def environment_to_json(environment: Environment) -> dict[str, object]:
    """Return what is known of `environment`, as JSON's types."""
    known = {name: value for name in _FIELDS if (value := getattr(environment, name))}
    if environment.compute_capability:
        known["compute_capability"] = capability_text(environment.compute_capability)
    return known


def environment_from_json(fields: object) -> Environment:
    """Read what `environment_to_json` writes. Raises BadValue or UnknownName."""
    given = dict(known_keys("environment", fields, _FIELDS))
    given["compute_capability"] = parse_capability(given.get("compute_capability"))
    return Environment(**given)


def capability_text(capability: tuple[int, int]) -> str:
    """Return `'8.9'` for `(8, 9)`."""
    return f"{capability[0]}.{capability[1]}"


def parse_capability(text: object) -> tuple[int, int] | None:
    """Return `(8, 9)` for `'8.9'` and None for None. Raises BadValue."""
    if text is None:
        return None
    found = re.fullmatch(r"([0-9]+)\.([0-9]+)", text) if isinstance(text, str) else None
    if not found:
        raise BadValue("not a compute capability", value=text, todo='Write it as "8.9".')
    return int(found[1]), int(found[2])


def local_environment(*, libraries: Iterable[str] = LIBRARIES, **known: Any) -> Environment:
    """Return this host, user, Python and the installed versions of `libraries`, importing none of them.

    `known` adds or overrides fields: the card, the driver, `whichlora_version`; its `versions` are merged in, so that
    the caller can say which CUDA torch was built for.
    """
    given: dict[str, Any] = {
        "host_name": platform.node() or None,
        "cpu_name": _cpu_name(),
        "user_name": _user_name(),
        "os_name": platform.platform() or None,
        "python_version": platform.python_version(),
        "whichlora_version": _version("whichlora"),
    } | known
    installed = {library: version for library in libraries if (version := _version(library))}
    given["versions"] = installed | dict(known.get("versions") or {})
    return Environment(**known_keys("environment", given, _FIELDS))


def _capability(value: Any) -> tuple[int, int] | None:
    if value is None:
        return None
    whole = isinstance(value, tuple | list) and all(isinstance(part, int) and part >= 0 for part in value)
    if not whole or len(value) != 2:
        raise BadValue("compute_capability must be two whole numbers", value=value, todo="Give (8, 9).")
    return value[0], value[1]


def _version(library: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(library) or None
    except metadata.PackageNotFoundError:
        return None


def _user_name() -> str | None:
    try:
        return getpass.getuser() or None
    except (ImportError, KeyError, OSError):  # a container's user without a name
        return None


def _cpu_name() -> str | None:
    """Return the processor's name: /proc/cpuinfo knows it under Linux, where `platform.processor` says x86_64."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or None
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, None) or platform.processor() or None


_FIELDS = tuple(Environment.__dataclass_fields__)
