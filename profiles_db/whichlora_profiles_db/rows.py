"""A measurement as a row, and back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import timezone
from typing import Any

from whichlora_estimators.workload import Workload

from .canonical import canonical_json, content_hash
from .environment import PRIVATE, Environment, capability_text, parse_capability
from .measurement import COUNTERS, TIMES, Measurement, phases_from_json, phases_to_json
from .times import SUMMARY, TimeStats
from .workload_form import workload_content, workload_from_stored

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


def row_of(measurement: Measurement) -> tuple[Any, ...]:
    """Return the values of COLUMNS for one measurement."""
    values = _workload_values(measurement.workload) | _environment_values(measurement.environment)
    values |= {name: getattr(measurement, name) for name in (*_PLAIN, *COUNTERS)}
    moment = measurement.measured_at
    values["id"] = measurement.id
    values["measured_at"] = moment and moment.astimezone(timezone.utc).replace(tzinfo=None)
    values["phase_peaks"] = canonical_json(phases_to_json(measurement.phase_peaks))
    for name in TIMES:
        values |= _times_values(name, getattr(measurement, name))
    return tuple(values[name] for name in COLUMNS)


def origins_of(measurement: Measurement) -> list[tuple[str, str, str]]:
    """Return the rows of table origin for one measurement: what is known of host and user."""
    names = {kind: getattr(measurement.environment, kind) for kind in PRIVATE}
    return [(measurement.id, kind, name) for kind, name in names.items() if name is not None]


def config_rows(measurements: Sequence[Measurement]) -> dict[str, str]:
    """Return the rows of table config that `measurements` refer to."""
    texts = {canonical_json(measurement.workload.config) for measurement in measurements}
    return {content_hash(json.loads(text)): text for text in texts}


class RowReader:
    """Builds measurements from rows; workloads and environments that repeat are built once."""

    def __init__(self, configs: Mapping[str, str]) -> None:
        self._configs = {config_id: json.loads(text) for config_id, text in configs.items()}
        self._workloads: dict[tuple[str, str], Workload] = {}
        self._environments: dict[tuple[Any, ...], Environment] = {}

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


def _workload_values(workload: Workload) -> dict[str, Any]:
    content = workload_content(workload)
    config = content.pop("config")
    unlabelled = {name: value for name, value in content.items() if name != "id"}
    return {
        "workload_id": content_hash(unlabelled | {"config": config}),
        "config_id": config,
        "workload": canonical_json(content),
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
