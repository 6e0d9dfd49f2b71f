"""The library behind `whichlora estimate`: a model, a card and a setup in, a prediction out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from whichlora_calibration import CURRENT, Choice, Prediction, predict
from whichlora_estimators.errors import WhichloraError
from whichlora_estimators.families import all_families
from whichlora_estimators.gpus import Gpu, find_gpu
from whichlora_estimators.methods import find_method
from whichlora_estimators.models import ModelShape, load_model
from whichlora_estimators.stack import NEWEST_STACK, Stack, parse_stack
from whichlora_estimators.timeline import count_parameters
from whichlora_estimators.workload import Workload, workload_from_json

from .pickconfig import CHECKPOINTING_ABOVE, JOINED_METHODS

SCHEMA = 1
#: The fields of answers that hold the times of a prediction.
TIME_NAMES = {"step": "step_s", "prefill": "prefill_s", "decode": "decode_s_per_token"}


def estimate(
    model: str | ModelShape,
    gpu: str | Gpu,
    *,
    method: str = "lora",
    checkpointing: bool | None = None,
    offline: bool = False,
    stack: str | Stack = NEWEST_STACK,
    correction: Choice = CURRENT,
    **setup: Any,
) -> Prediction:
    """Predict peak memory and time of a training step, or of a generation (`phase="generate"`), on a card.

    `method` may join a quantization (`"qlora"`); `checkpointing=None` turns it on above 1B parameters; `setup` takes
    the other fields of `Workload` (batch_size, seq_len, rank, …), `stack` library versions ("torch==2.6.0"), newest
    ones unless named; `correction=None` gives the formula alone. Raises WhichloraError for what is not known.
    """
    shape = load_model(model, offline=offline) if isinstance(model, str) else model
    card = find_gpu(gpu) if isinstance(gpu, str) else gpu
    versions = parse_stack(stack) if isinstance(stack, str) else stack
    workload = make_workload(shape, method=method, checkpointing=checkpointing, **setup)
    return predict(workload, card, stack=versions, correction=correction)


def make_workload(
    shape: ModelShape, *, method: str = "lora", checkpointing: bool | None = None, **setup: Any
) -> Workload:
    """Describe a workload with the defaults that `estimate` documents; a model of one task is trained for that."""
    if method in JOINED_METHODS:
        method, joined = JOINED_METHODS[method]
        setup["quantization"] = joined
    if checkpointing is None:
        allowed = setup.get("phase", "train") == "train" and find_method(method).allows_checkpointing
        checkpointing = allowed and checkpoints_by_default(shape)
    recipe = all_families().get(shape.family)
    if recipe is not None and len(recipe.tasks) == 1:
        setup = {"task": recipe.tasks[0], **setup}
    return Workload(model=shape.name, config=shape.config, method=method, checkpointing=checkpointing, **setup)


def checkpoints_by_default(shape: ModelShape) -> bool:
    """Say whether practitioners checkpoint activations when they fine-tune this model: above 1B parameters."""
    size = shape.parameters if shape.parameters is not None else count_parameters(shape.config)
    return size > CHECKPOINTING_ABOVE


def answer_lines(
    lines: Iterable[Mapping[str, Any]], gpu: Gpu, *, stack: Stack = NEWEST_STACK, correction: Choice = CURRENT
) -> Iterator[dict[str, Any]]:
    """Answer workloads in the JSON-lines format in order; one that must be refused gets its `error`."""
    for fields in lines:
        try:
            workload = workload_from_json(fields)
            yield answer(predict(workload, gpu, stack=stack, correction=correction))
        except WhichloraError as error:
            yield {"id": fields.get("id", ""), "error": str(error)}


def answer(prediction: Prediction) -> dict[str, Any]:
    """Flatten a prediction for machines: bytes and seconds, the times that its phase has."""
    found = prediction.estimate
    return {
        "id": found.workload.id,
        "model": found.workload.model,
        "gpu": found.gpu.slug,
        "trainable_params": found.trainable_params,
        "allocated_peak_bytes": prediction.allocated.expected_bytes,
        "reserved_peak_bytes": prediction.reserved.expected_bytes,
        "process_bytes": prediction.process.expected_bytes,
        "process_interval_bytes": [prediction.process.low_bytes, prediction.process.high_bytes],
        "coverage": prediction.process.coverage,
        "verdict": prediction.verdict.value,
        **{TIME_NAMES[name]: span.expected_s for name, span in prediction.times.items()},
        **{f"{TIME_NAMES[name]}_interval": [span.low_s, span.high_s] for name, span in prediction.times.items()},
        "peak_phase": found.peak.phase,
        "breakdown": found.breakdown,
        "evidence": prediction.evidence,
        "time_evidence": next((span.evidence for span in prediction.times.values()), None),
        "caveats": list(prediction.caveats),
    }
