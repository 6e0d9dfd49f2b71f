"""Laws of the measurement, of what it refuses, and of the hash that names it."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import pickle
import random
import subprocess
import sys
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whichlora_estimators.errors import BadValue, UnknownName, Unsupported, WhichloraError
from whichlora_estimators.workload import Workload
from whichlora_profiles_db import (
    Environment,
    Measurement,
    PhasePeak,
    TimeStats,
    local_environment,
    measurement_from_json,
    measurement_to_json,
    workload_id,
)
from whichlora_profiles_db.workload_form import FIRST_FIELDS, LATER_FIELDS

from .records import CONFIG, ENVIRONMENT, FULL, PLAIN, WORKLOAD, measurements

assert FULL.measured_at
OTHER: dict[str, Any] = {
    "workload": WORKLOAD.with_(rank=9),
    "environment": dataclasses.replace(ENVIRONMENT, gpu="rtx-3090"),
    "evidence": "published",
    "device": "cpu",
    "outcome": "failed",
    "measured_at": FULL.measured_at + timedelta(microseconds=1),
    "error": "",
    "trainable_params": 0,
    "weights_bytes": None,
    "model_bytes": 1,
    "allocated_peak_bytes": 4_001,
    "reserved_peak_bytes": None,
    "process_bytes": 6_001,
    "managed_peak_bytes": 7_001,
    "phase_peaks": {"load": PhasePeak(allocated_peak_bytes=1_500)},
    "step": TimeStats(samples_s=(0.25, 1 / 3, 0.125)),
    "prefill": TimeStats(median_s=0.5),
    "decode_per_token": None,
    "source": "another paper",
    "notes": "",
}


def shuffled(value: Any, rng: random.Random) -> Any:
    """Return equal JSON with the keys of its objects in another order."""
    if isinstance(value, list):
        return [shuffled(item, rng) for item in value]
    if isinstance(value, dict):
        return {key: shuffled(value[key], rng) for key in rng.sample(list(value), len(value))}
    return value


def test_the_full_record_is_full() -> None:
    """The record that tests fill in leaves no field of any part at its default."""
    for record in (FULL, FULL.workload, FULL.environment):
        for field in dataclasses.fields(record):
            factory = field.default_factory
            default = factory() if factory is not dataclasses.MISSING else field.default
            assert getattr(record, field.name) != default, field.name


def test_the_id_is_the_hash_of_the_known_content() -> None:
    """An id is SHA-256 of sorted, compact JSON of what is known, the config standing in by its own hash."""
    config = hashlib.sha256(b'{"eps":1e-05,"theta":500000}').hexdigest()
    text = (
        '{"device":"cpu","environment":{"compute_capability":"8.9","gpu":"\u00e4","versions":{"torch":"2.6.0"}},'
        '"evidence":"measured","measured_at":"2026-01-02T03:04:05.000006Z","outcome":"ok","process_bytes":7,'
        '"step":{"max_s":2,"mean_s":1.5,"median_s":1.5,"min_s":1,"samples_s":[1,2]},'
        '"workload":{"attention":"sdpa","batch_size":1,"checkpointing":false,"config":"' + config + '",'
        '"decode_len":1,"double_quantization":true,"dropout":0,"id":"","kbit_preparation":true,'
        '"last_logits_only":true,"method":"lora","model":"m","optimizer":"adamw","padded":false,"phase":"train",'
        '"precision":"bf16-true","prefill_len":1024,"quantization":"none","rank":16,"seq_len":1024,'
        '"target_len":null,"targets":"all-linear","task":"causal"}}'
    )
    measurement = Measurement(
        workload=Workload(model="m", config={"theta": 5e5, "eps": 1e-5}),
        environment=Environment(gpu="ä", compute_capability=(8, 9), versions={"torch": "2.6.0"}),
        evidence="measured",
        device="cpu",
        outcome="ok",
        measured_at=datetime(2026, 1, 2, 5, 4, 5, 6, tzinfo=timezone(timedelta(hours=2))),
        process_bytes=7,
        step=TimeStats(samples_s=(1, 2)),
    )
    assert measurement.id == hashlib.sha256(text.encode()).hexdigest()


@given(measurements(), st.integers())
def test_the_id_does_not_depend_on_the_order_of_fields(measurement: Measurement, seed: int) -> None:
    """JSON with its keys in any order reads as the same measurement, of the same id."""
    fields = shuffled(json.loads(json.dumps(measurement_to_json(measurement))), random.Random(seed))
    assert measurement_from_json(fields) == measurement
    assert measurement_from_json(fields).id == fields["id"] == measurement.id


@pytest.mark.parametrize("field", dataclasses.fields(Measurement), ids=lambda field: field.name)
def test_every_field_is_in_the_id(field: dataclasses.Field[Any]) -> None:
    """Changing any one field changes the id."""
    assert FULL.with_(**{field.name: OTHER[field.name]}).id != FULL.id


@pytest.mark.parametrize("field", dataclasses.fields(Environment), ids=lambda field: field.name)
def test_only_the_names_of_host_and_user_are_not(field: dataclasses.Field[Any]) -> None:
    """Leaving out a field of the environment changes the id, but for the two that are left out when sharing."""
    blank: Any = {} if field.name == "versions" else None
    changed = FULL.with_(environment=dataclasses.replace(ENVIRONMENT, **{field.name: blank}))
    assert (changed.id == FULL.id) == (field.name in ("host_name", "user_name"))
    assert FULL.without_names().id == FULL.id
    assert FULL.without_names().environment.host_name is FULL.without_names().environment.user_name is None


@pytest.mark.parametrize("field", dataclasses.fields(Workload), ids=lambda field: field.name)
def test_the_workload_id_leaves_out_the_label_alone(field: dataclasses.Field[Any]) -> None:
    """Every field of a workload but its label is in the workload's id."""
    others = {"config": CONFIG | {"more": 1}, "model": "other", "rank_pattern": {}}
    default = others.get(field.name, field.default)
    assert (workload_id(WORKLOAD.with_(**{field.name: default})) == workload_id(WORKLOAD)) == (field.name == "id")


def test_equal_numbers_are_one_number() -> None:
    """A config that says 32 and one that says 32.0 are one config, as they are equal."""
    other = CONFIG | {"rope_theta": 500000, "rope_scaling": {"factor": 32, "type": "yarn"}}
    assert workload_id(WORKLOAD.with_(config=other)) == workload_id(WORKLOAD)
    assert workload_id(Workload(model="m", config={}, dropout=0)) == workload_id(Workload(model="m", config={}))


def test_a_field_that_workloads_gain_is_given_its_past() -> None:
    """Each field of Workload is one that every stored workload spells out, or has a value for those that do not."""
    fields = {field.name for field in dataclasses.fields(Workload)}
    assert fields == {*FIRST_FIELDS, *LATER_FIELDS}, "add new fields to LATER_FIELDS, with what was done before"
    assert not {*FIRST_FIELDS} & {*LATER_FIELDS}


@given(measurements())
def test_copies_are_equal(measurement: Measurement) -> None:
    """A measurement, pickled as workers send it or deeply copied, is equal to itself and hashes the same."""
    for other in (pickle.loads(pickle.dumps(measurement)), copy.deepcopy(measurement)):
        assert other == measurement
        assert hash(other) == hash(measurement)


@pytest.mark.parametrize(
    "changes",
    [
        {"evidence": "formula"},
        {"device": "tpu"},
        {"outcome": "fine"},
        {"device": "null"},
        {"evidence": "rehearsed"},
        {"evidence": "published", "source": ""},
        {"measured_at": None},
        {"measured_at": datetime(2026, 1, 1)},
        {"measured_at": "2026-01-01T00:00:00Z"},
        {"outcome": "ok"},
        {"allocated_peak_bytes": 0},
        {"process_bytes": -1},
        {"weights_bytes": 1.5},
        {"model_bytes": 2**63},
        {"trainable_params": True},
        {"allocated_peak_bytes": 5_001},
        {"phase_peaks": {"load": 3}},
        {"phase_peaks": {"": PhasePeak(allocated_peak_bytes=1)}},
        {"step": 0.5},
        {"notes": None},
        {"workload": {}},
        {"environment": None},
    ],
    ids=str,
)
def test_contradictions_are_refused(changes: dict[str, Any]) -> None:
    """What cannot have been seen cannot be recorded."""
    with pytest.raises((BadValue, UnknownName)):
        FULL.with_(**changes)


@pytest.mark.parametrize("name", ["step", "prefill", "decode_per_token"])
def test_the_null_device_has_no_times(name: str) -> None:
    """A time on the null device is refused, whichever it is."""
    with pytest.raises(Unsupported, match="null"):
        PLAIN.with_(**{name: TimeStats(mean_s=1)})


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"samples_s": (0.0,)},
        {"samples_s": (float("nan"),)},
        {"samples_s": (1.0, float("inf"))},
        {"samples_s": (None,)},
        {"samples_s": "12"},
        {"samples_s": (1.0, 2.0), "median_s": 1.4},
        {"min_s": 2.0, "max_s": 1.0},
        {"min_s": 2.0, "median_s": 1.0},
        {"mean_s": 3.0, "max_s": 1.0},
        {"mean_s": 0.0},
    ],
    ids=str,
)
def test_summaries_that_no_samples_have_are_refused(fields: dict[str, Any]) -> None:
    """Times are positive and finite, and their summary is one that times can have."""
    with pytest.raises(BadValue):
        TimeStats(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"gpu": ""},
        {"host_name": "\udc80"},
        {"gpu_total_bytes": 0},
        {"compute_capability": (8,)},
        {"compute_capability": "8.9"},
        {"versions": {"torch": ""}},
        {"versions": {"": "1"}},
        {"versions": [("torch", "2")]},
    ],
    ids=str,
)
def test_unknown_is_none_in_an_environment(fields: dict[str, Any]) -> None:
    """Empty text, zero bytes and malformed values are refused where None says unknown."""
    with pytest.raises(BadValue):
        Environment(**fields)


@pytest.mark.parametrize("config", [{1: 2}, {"a": float("nan")}, {"a": {"b": {1, 2}}}, {"a": "\udc80"}], ids=ascii)
def test_a_config_is_json(config: dict[Any, Any]) -> None:
    """A config that no config.json can hold has no id."""
    with pytest.raises(BadValue):
        _ = PLAIN.with_(workload=Workload(model="m", config=config)).id


@pytest.mark.parametrize(
    "changes",
    [
        {"id": "0" * 64},
        {"schema": 2},
        {"colour": "red"},
        {"measured_at": "yesterday"},
        {"measured_at": "2026-01-01T00:00:00"},
        {"environment": {"card": "x"}},
        {"environment": {"compute_capability": "8"}},
        {"step": {"mode_s": 1}},
        {"phase_peaks": {"load": {"peak": 1}}},
        {"phase_peaks": []},
        {"workload": {"model": "m"}},
        {"workload": []},
    ],
    ids=str,
)
def test_json_that_is_not_a_measurement_is_refused(changes: dict[str, Any]) -> None:
    """Unknown keys, malformed values and ids of other content are errors."""
    with pytest.raises(WhichloraError):
        measurement_from_json(measurement_to_json(FULL) | changes)


@pytest.mark.parametrize("name", ["workload", "environment", "evidence", "device", "outcome"])
def test_json_without_its_essentials_is_refused(name: str) -> None:
    """A measurement without its workload, origin or outcome is none."""
    with pytest.raises(BadValue, match=name):
        measurement_from_json({key: value for key, value in measurement_to_json(FULL).items() if key != name})


def test_undecodable_bytes_in_a_message_cost_no_measurement() -> None:
    """What a failing library said is kept even where it is not text, with the bytes spelled out."""
    assert FULL.with_(error="bad \udc80 byte").error == r"bad \udc80 byte"


def test_the_environment_here_is_what_is_installed() -> None:
    """Versions are those of the installed libraries; what the caller knows is added and wins."""
    import hypothesis

    here = local_environment(libraries=("hypothesis", "no-such-library"), gpu="a100", versions={"cuda": "12.4"})
    assert here.versions == {"cuda": "12.4", "hypothesis": hypothesis.__version__}
    assert here.gpu == "a100"
    assert here.python_version == ".".join(str(part) for part in sys.version_info[:3])
    assert local_environment(os_name="Other").os_name == "Other"


def test_importing_is_cheap() -> None:
    """Importing the package imports neither DuckDB nor anything else that is heavy."""
    heavy = "{'duckdb', 'numpy', 'torch', 'pyarrow', 'pandas'}"
    code = f"import sys, whichlora_profiles_db; print(*{heavy} & set(sys.modules))"
    search = "import sys; sys.path[:] = " + repr(sys.path)
    assert subprocess.run([sys.executable, "-c", f"{search}\n{code}"], capture_output=True, check=True).stdout == b"\n"
