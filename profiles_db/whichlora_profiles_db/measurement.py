"""What one rehearsal, one run or one publication showed. Immutable, complete in provenance, failures included."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from whichlora_estimators.errors import BadValue, Unsupported
from whichlora_estimators.workload import Workload

from .canonical import content_hash
from .checks import (
    check_choice,
    check_count,
    check_object,
    is_unicode,
    known_keys,
    parse_utc,
    sorted_mapping,
    utc,
    utc_text,
)
from .environment import PRIVATE, Environment, environment_from_json, environment_to_json
from .times import TimeStats, times_from_json, times_to_json
from .workload_form import workload_content, workload_from_stored, workload_id, workload_to_json

SCHEMA = 1  # of the JSON form
EVIDENCES = ("rehearsed", "measured", "published")
DEVICES = ("null", "cuda", "cpu")
OUTCOMES = ("ok", "oom", "failed")
PEAKS = ("allocated_peak_bytes", "reserved_peak_bytes")
COUNTERS = ("trainable_params", "weights_bytes", "model_bytes", *PEAKS, "process_bytes", "managed_peak_bytes")
TIMES = ("step", "prefill", "decode_per_token")

_DEVICES_OF = {"rehearsed": ("null",), "measured": ("cuda", "cpu"), "published": ("cuda", "cpu")}


@dataclass(frozen=True, slots=True, kw_only=True)
class PhasePeak:
    """The peaks of PyTorch's counters within one phase of a run, in bytes; None where unknown."""

    allocated_peak_bytes: int | None = None
    reserved_peak_bytes: int | None = None

    def __post_init__(self) -> None:
        _check_peaks(self)
        if self.allocated_peak_bytes is None and self.reserved_peak_bytes is None:
            raise BadValue("a phase without a peak", todo="Leave out phases of which nothing is known.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One workload, where and how it ran, and what was seen. What is unknown is None, never 0.

    `evidence` is "rehearsed" (null device: no times), "measured" (cuda, cpu) or "published" (then `source` cites it).
    `outcome` is "ok", "oom" or "failed", the latter two with `error` where a text is known. `weights_bytes` is
    allocated once the weights are there, `model_bytes` with adapters and inputs too; peaks are maxima over the run.
    `managed_peak_bytes` (paged optimizers; 0 for none) may leave the card and are part of no other counter.
    `decode_per_token` holds seconds a token. Raises BadValue, UnknownName, or Unsupported for a time on null.
    """

    workload: Workload
    environment: Environment
    evidence: str
    device: str
    outcome: str
    measured_at: datetime | None
    error: str = ""
    trainable_params: int | None = None
    weights_bytes: int | None = None
    model_bytes: int | None = None
    allocated_peak_bytes: int | None = None
    reserved_peak_bytes: int | None = None
    process_bytes: int | None = None
    managed_peak_bytes: int | None = None
    phase_peaks: Mapping[str, PhasePeak] = field(default_factory=dict)
    step: TimeStats | None = None
    prefill: TimeStats | None = None
    decode_per_token: TimeStats | None = None
    source: str = ""
    notes: str = ""

    def __post_init__(self) -> None:
        _check_parts(self)
        _check_origin(self)
        _check_texts(self)
        for name in ("weights_bytes", "model_bytes", "process_bytes"):
            check_count(name, getattr(self, name))
        for name in ("trainable_params", "managed_peak_bytes"):
            check_count(name, getattr(self, name), least=0)
        _check_peaks(self)
        object.__setattr__(self, "phase_peaks", _phase_peaks(self.phase_peaks))
        _check_times(self)

    def __hash__(self) -> int:
        return hash(self.id)

    @property
    def id(self) -> str:
        """SHA-256 of the canonical JSON of what is known, but for host and user name, as 64 hexadecimal digits.

        Those two may be taken out before sharing, and a measurement stays the same one without them.
        """
        return content_hash(measurement_content(self, workload_content(self.workload)))

    @property
    def workload_id(self) -> str:
        """Hash of the workload alone, whatever its line was called."""
        return workload_id(self.workload)

    def with_(self, **changes: Any) -> Measurement:
        """Return a copy with some fields changed: another measurement, with another id."""
        return dataclasses.replace(self, **changes)

    def without_names(self) -> Measurement:
        """Return the same measurement, of the same id, without host and user name."""
        return self.with_(environment=self.environment.without_names())


def measurement_to_json(measurement: Measurement) -> dict[str, Any]:
    """Return the JSON form of a measurement: what is known, with its `schema` and `id`."""
    known = _known(measurement)
    known["workload"] = workload_to_json(measurement.workload)
    known["environment"] = environment_to_json(measurement.environment)
    return {"schema": SCHEMA, "id": measurement.id, **known}


def measurement_from_json(fields: object) -> Measurement:
    """Read what `measurement_to_json` writes. Raises BadValue or UnknownName, BadValue too if the id is another's."""
    given = dict(known_keys("measurement", fields, ("schema", "id", *_FIELDS)))
    schema, claimed = given.pop("schema", SCHEMA), given.pop("id", None)
    if schema != SCHEMA:
        raise BadValue("a measurement of another schema", value=schema, todo=f"This version reads schema {SCHEMA}.")
    for name in ("workload", "environment", "evidence", "device", "outcome"):
        if name not in given:
            raise BadValue(f"measurement without {name!r}", value=claimed, todo=f"Add {name!r}.")
    measurement = Measurement(**_parsed(given))
    if claimed is not None and claimed != measurement.id:
        raise BadValue("the id is not that of the content", value=claimed, todo=f"The content gives {measurement.id}.")
    return measurement


def _parsed(given: dict[str, Any]) -> dict[str, Any]:
    parsed = given | {
        "workload": workload_from_stored(check_object("workload", given["workload"])),
        "environment": environment_from_json(given["environment"]),
        "phase_peaks": phases_from_json(given.get("phase_peaks", {})),
        "measured_at": parse_utc("measured_at", text) if (text := given.get("measured_at")) is not None else None,
    }
    times = {name: times_from_json(name, given[name]) for name in TIMES if given.get(name) is not None}
    return parsed | times


def phases_to_json(phases: Mapping[str, PhasePeak]) -> dict[str, dict[str, int]]:
    """Return `{"backward": {"allocated_peak_bytes": …}}`, what is unknown left out."""
    return {
        phase: {name: value for name in PEAKS if (value := getattr(peak, name)) is not None}
        for phase, peak in phases.items()
    }


def phases_from_json(fields: object) -> dict[str, PhasePeak]:
    """Read what `phases_to_json` writes. Raises BadValue or UnknownName."""
    phases = sorted_mapping("phase_peaks", fields)
    return {phase: PhasePeak(**known_keys("phase peak", peak, PEAKS)) for phase, peak in phases.items()}


def measurement_content(measurement: Measurement, workload: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the id is the hash of, given the workload's content.

    Whatever is unknown is absent, so that a field added later changes no id.
    """
    known = _known(measurement)
    known["workload"] = workload
    environment = environment_to_json(measurement.environment)
    known["environment"] = {name: value for name, value in environment.items() if name not in PRIVATE}
    return known


def _known(measurement: Measurement) -> dict[str, Any]:
    """Return the fields that say something, as JSON's types, without workload and environment."""
    known = {name: value for name in _PLAIN if (value := getattr(measurement, name)) not in (None, "")}
    if measurement.measured_at is not None:
        known["measured_at"] = utc_text(measurement.measured_at)
    if measurement.phase_peaks:
        known["phase_peaks"] = phases_to_json(measurement.phase_peaks)
    for name in TIMES:
        if (times := getattr(measurement, name)) is not None:
            known[name] = times_to_json(times)
    return known


def _check_parts(measurement: Measurement) -> None:
    for name, kind in (("workload", Workload), ("environment", Environment)):
        if not isinstance(getattr(measurement, name), kind):
            raise BadValue(f"{name} must be a {kind.__name__}", value=getattr(measurement, name), todo="Build one.")


def _check_origin(measurement: Measurement) -> None:
    check_choice("evidence", measurement.evidence, EVIDENCES)
    check_choice("device", measurement.device, DEVICES)
    check_choice("outcome", measurement.outcome, OUTCOMES)
    allowed = _DEVICES_OF[measurement.evidence]
    if measurement.device not in allowed:
        todo = f"What is {measurement.evidence} ran on {' or '.join(allowed)}."
        raise BadValue("evidence and device contradict each other", value=measurement.device, todo=todo)
    if measurement.evidence == "published" and not measurement.source:
        raise BadValue("published without a source", todo="Cite where the number is from.")
    if measurement.measured_at is not None:
        object.__setattr__(measurement, "measured_at", utc("measured_at", measurement.measured_at))
    elif measurement.evidence != "published":
        raise BadValue("no time of measurement", todo="Give datetime.now(timezone.utc).")


def _check_texts(measurement: Measurement) -> None:
    for name in ("error", "source", "notes"):
        text = getattr(measurement, name)
        if not isinstance(text, str):
            raise BadValue(f"{name} must be text", value=text, todo="Give an empty text where there is none.")
        # Messages quote whatever bytes a failing library held; losing the measurement over one would be worse.
        if not is_unicode(text):
            object.__setattr__(measurement, name, text.encode(errors="backslashreplace").decode())
    if measurement.outcome == "ok" and measurement.error:
        raise BadValue("an error although the outcome is ok", value=measurement.error, todo="Use notes for remarks.")


def _check_peaks(holder: Measurement | PhasePeak) -> None:
    for name in PEAKS:
        check_count(name, getattr(holder, name))
    allocated, reserved = holder.allocated_peak_bytes, holder.reserved_peak_bytes
    if allocated is not None and reserved is not None and reserved < allocated:
        todo = f"PyTorch allocates from what it reserved, here {reserved}: check which counter was read."
        raise BadValue("allocated peak above reserved peak", value=allocated, todo=todo)


def _phase_peaks(phases: object) -> dict[str, object]:
    checked = sorted_mapping("phase_peaks", phases)
    for phase, peak in checked.items():
        if not isinstance(peak, PhasePeak):
            raise BadValue(f"peak of phase {phase} must be a PhasePeak", value=peak, todo="Build one.")
    return checked


def _check_times(measurement: Measurement) -> None:
    for name in TIMES:
        times = getattr(measurement, name)
        if times is not None and not isinstance(times, TimeStats):
            raise BadValue(f"{name} must be TimeStats", value=times, todo="Give TimeStats(samples_s=…).")
        if times is not None and measurement.device == "null":
            raise Unsupported(
                "a time on the null device", value=name, todo="Kernels take no time there: leave it None."
            )


_FIELDS = tuple(Measurement.__dataclass_fields__)
_PLAIN = tuple(
    name for name in _FIELDS if name not in ("workload", "environment", "measured_at", "phase_peaks", *TIMES)
)
