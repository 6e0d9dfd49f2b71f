"""A workload as stored content: its JSON form, and the hashes that name its config and itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from whichlora_estimators.workload import Workload, workload_from_json

from .canonical import content_hash

# The fields that every stored workload spells out.
FIRST_FIELDS = (
    "model",
    "config",
    "id",
    "task",
    "phase",
    "method",
    "rank",
    "targets",
    "dropout",
    "precision",
    "quantization",
    "double_quantization",
    "kbit_preparation",
    "checkpointing",
    "attention",
    "optimizer",
    "batch_size",
    "seq_len",
    "target_len",
    "padded",
    "prefill_len",
    "decode_len",
    "last_logits_only",
)
# Fields that Workload gained later, with what older measurements did. A field with this value is not written, so that
# old and new measurements of one workload keep one hash; a default that changes afterwards changes nothing here.
LATER_FIELDS: dict[str, object] = {
    "target_parameters": (),
    "rank_pattern": {},
    "exclude_modules": (),
    "layers_to_transform": (),
    "layer_replication": (),
    "trainable_tokens": 0,
    "modules_to_save": (),
    "ensure_weight_tying": False,
    "bias": "none",
    "lora_bias": False,
    "num_virtual_tokens": 20,
    "encoder_hidden_size": None,
    "prefix_projection": False,
    "reentrant": False,
    "accumulation": 1,
    "clip_grad_norm": None,
    "cache": "dynamic",
    "output_kept": True,
    "previous_kept": False,
}

_FIELDS = tuple(field.name for field in dataclasses.fields(Workload))


def workload_to_json(workload: Workload) -> dict[str, Any]:
    """Return every field of `workload` as JSON's types, its config included."""
    fields = {name: getattr(workload, name) for name in _FIELDS}
    kept = {name: value for name, value in fields.items() if name not in LATER_FIELDS or value != LATER_FIELDS[name]}
    return {name: _as_list(value) for name, value in kept.items()}


def _as_list(value: Any) -> Any:
    return [_as_list(each) for each in value] if isinstance(value, tuple) else value


def workload_from_stored(fields: Mapping[str, Any]) -> Workload:
    """Read what `workload_to_json` wrote, whichever version wrote it. Raises BadValue or UnknownName."""
    return workload_from_json({**LATER_FIELDS, **fields})


def workload_content(workload: Workload) -> dict[str, Any]:
    """Return the JSON form with the config's hash in place of the config."""
    return workload_to_json(workload) | {"config": config_id(workload.config)}


def workload_id(workload: Workload) -> str:
    """Return the hash of what ran, whatever its line was called: equal for measurements that may be compared."""
    return content_id(workload_content(workload))


def content_id(content: Mapping[str, Any]) -> str:
    """Return the workload id of a `workload_content`."""
    return content_hash({name: value for name, value in content.items() if name != "id"})


def config_id(config: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a config's canonical JSON. Raises BadValue for what is not JSON."""
    return content_hash(config)
