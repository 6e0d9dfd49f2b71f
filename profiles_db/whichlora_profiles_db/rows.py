"""A measurement as a row, and back."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timezone
from typing import Any

from whichlora_estimators.workload import Workload

from .canonical import canonical_json, content_hash, text_hash
from .environment import PRIVATE, Environment, capability_text, parse_capability
from .measurement import COUNTERS, TIMES, Measurement, measurement_content, phases_from_json, phases_to_json
from .times import SUMMARY, TimeStats
from .workload_form import content_id, workload_from_stored, workload_to_json

FILTERS_OF_WORKLOAD = ("model", "task", "phase", "method", "precision", "quantization")
_PLAIN = ("evidence", "device", "outcome", "error", "source", "notes")
_ENVIRONMENT = ("gpu", "gpu_name", "driver_version", "cpu_name", "os_name", "python_version", "whichlora_version")
_SAMPLES = tuple(f"{name}_samples_s" for name in TIMES)

# Every column of table measurement but seq, with its type; the order is that of the rows made and read here.
COLUMNS: Mapping[str, str] = {
    **dict.fromkeys(("id", "workload_id", "config_id", "workload"), "VARCHAR"),
    **dict.fromkeys(FILTERS_OF_WORKLOAD, "VARCHAR"),
    **dict.fromkeys(_PLAIN, "VARCHAR"),
    "measured_at": "TIMESTAMP",
    **dict.fromkeys(_ENVIRONMENT, "VARCHAR"),
    "gpu_total_bytes": "BIGINT",
    "compute_capability": "VARCHAR",
    "versions": "VARCHAR",
    **dict.fromkeys(COUNTERS, "BIGINT"),
    "phase_peaks": "VARCHAR",
    **dict.fromkeys(_SAMPLES, "DOUBLE[]"),
    **{f"{name}_{summary}": "DOUBLE" for name in TIMES for summary in SUMMARY},
}


#: Columns that older stores and packs lack, where they are NULL, by the first format of packs that has them.
LATER: Mapping[str, int] = {"managed_peak_bytes": 2}


def select_list(columns: Mapping[str, str], *, lacking: Collection[str]) -> str:
    """Return these columns for a SELECT from where some are not there yet."""
    named = (f'NULL::{kind} AS "{name}"' if name in lacking else f'"{name}"' for name, kind in columns.items())
    return ", ".join(named)


@dataclass(frozen=True, slots=True, kw_only=True)
class _WorkloadTexts:
    """What is stored of a workload: its content for the id, its columns, and its config."""

    workload: Workload
    content: Mapping[str, Any]
    values: Mapping[str, Any]
    config: str


class WorkloadWriter:
    """Makes what is stored of workloads; objects that repeat are worked on once."""

    def __init__(self) -> None:
        self._known: dict[int, _WorkloadTexts] = {}

    def texts(self, workload: Workload) -> _WorkloadTexts:
        """Return what is stored of a workload."""
        found = self._known.get(id(workload))
        if found is None:
            config = canonical_json(workload.config)
            content = workload_to_json(workload) | {"config": text_hash(config)}
            values = _workload_values(workload, content)
            # It holds the workload, so that no other object gets its address.
            found = _WorkloadTexts(workload=workload, content=content, values=values, config=config)
            self._known[id(workload)] = found
        return found


class RowWriter:
    """Collects the rows of the three tables for a set of measurements, each once."""

    def __init__(self, measurements: Iterable[Measurement], *, workloads: WorkloadWriter | None = None) -> None:
        self.measurements: dict[str, tuple[Any, ...]] = {}
        self.configs: dict[str, str] = {}
        self.origins: set[tuple[str, str, str]] = set()
        self._workloads = workloads or WorkloadWriter()
        for measurement in measurements:
            self._add(measurement)

    def _add(self, measurement: Measurement) -> None:
        texts = self._workloads.texts(measurement.workload)
        id_ = content_hash(measurement_content(measurement, texts.content))
        self.configs[texts.values["config_id"]] = texts.config
        self.origins |= {
            (id_, kind, name) for kind in PRIVATE if (name := getattr(measurement.environment, kind)) is not None
        }
        if id_ not in self.measurements:
            values = {"id": id_, **texts.values, **_values(measurement)}
            self.measurements[id_] = tuple(values[name] for name in COLUMNS)


class RowReader:
    """Builds measurements from rows; workloads and environments that repeat are built once."""

    def __init__(self, configs: Mapping[str, str]) -> None:
        self._configs = {config_id: json.loads(text) for config_id, text in configs.items()}
        self._workloads: dict[tuple[str, str], Workload] = {}
        self._environments: dict[tuple[Any, ...], Environment] = {}

    def learn(self, config_id: str, text: str) -> None:
        """Take one more config."""
        self._configs[config_id] = json.loads(text)

    def measurement(self, row: Sequence[Any], names: Mapping[str, str]) -> Measurement:
        """Return the measurement of one row of COLUMNS; `names` are its host and user, where known."""
        values = dict(zip(COLUMNS, row, strict=True))
        moment = values["measured_at"]
        known: dict[str, Any] = {name: values[name] for name in (*_PLAIN, *COUNTERS)}
        known |= {name: _times(name, values) for name in TIMES}
        return Measurement(
            workload=self._workload(values["workload"], values["config_id"]),
            environment=self._environment(values, names),
            measured_at=moment and moment.replace(tzinfo=timezone.utc),
            phase_peaks=phases_from_json(json.loads(values["phase_peaks"])),
            **known,
        )

    def _workload(self, text: str, config_id: str) -> Workload:
        key = (text, config_id)
        if key not in self._workloads:
            fields = json.loads(text) | {"config": self._configs[config_id]}
            self._workloads[key] = workload_from_stored(fields)
        return self._workloads[key]

    def _environment(self, values: Mapping[str, Any], names: Mapping[str, str]) -> Environment:
        fields: dict[str, Any] = {
            name: values[name] for name in (*_ENVIRONMENT, "gpu_total_bytes", "compute_capability", "versions")
        }
        key = (*fields.values(), *(names.get(kind) for kind in PRIVATE))
        if key not in self._environments:
            fields["compute_capability"] = parse_capability(fields["compute_capability"])
            fields["versions"] = json.loads(fields["versions"])
            self._environments[key] = Environment(**(fields | dict(names)))
        return self._environments[key]


def _values(measurement: Measurement) -> dict[str, Any]:
    values = {name: getattr(measurement, name) for name in (*_PLAIN, *COUNTERS)}
    moment = measurement.measured_at
    values["measured_at"] = moment and moment.astimezone(timezone.utc).replace(tzinfo=None)
    values["phase_peaks"] = canonical_json(phases_to_json(measurement.phase_peaks))
    for name in TIMES:
        values |= _times_values(name, getattr(measurement, name))
    return values | _environment_values(measurement.environment)


def _workload_values(workload: Workload, content: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "workload_id": content_id(content),
        "config_id": content["config"],
        "workload": canonical_json({name: value for name, value in content.items() if name != "config"}),
        **{name: getattr(workload, name) for name in FILTERS_OF_WORKLOAD},
    }


def _environment_values(environment: Environment) -> dict[str, Any]:
    capability = environment.compute_capability
    return {
        **{name: getattr(environment, name) for name in (*_ENVIRONMENT, "gpu_total_bytes")},
        "compute_capability": capability and capability_text(capability),
        "versions": canonical_json(environment.versions),
    }


def _times_values(name: str, times: TimeStats | None) -> dict[str, Any]:
    values: dict[str, Any] = {f"{name}_{summary}": times and getattr(times, summary) for summary in SUMMARY}
    values[f"{name}_samples_s"] = list(times.samples_s) if times and times.samples_s else None
    return values


def _times(name: str, values: Mapping[str, Any]) -> TimeStats | None:
    samples = tuple(values[f"{name}_samples_s"] or ())
    summary = {field: values[f"{name}_{field}"] for field in SUMMARY}
    known = samples or any(value is not None for value in summary.values())
    return TimeStats(samples_s=samples, **summary) if known else None
