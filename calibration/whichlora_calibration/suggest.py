"""Which short runs on a card would narrow its intervals most: those whose features its measurements say least about."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any

from whichlora_estimators.errors import WhichloraError
from whichlora_estimators.gpus import Gpu
from whichlora_estimators.models import default_models, load_model
from whichlora_estimators.workload import Workload
from whichlora_profiles_db import workload_id

from .cases import Case
from .fit import candidates
from .forecasts import Forecast, Forecasts, time_features

#: The share of a card's memory that a suggested run may be predicted to take, and the seconds that it may last.
FULLEST, LONGEST_S = 0.85, 60.0
#: Steps, or generated tokens, that a run takes.
RUN_STEPS, RUN_TOKENS = 8, 32
#: At least so many bytes a weight, by quantization; batch and length of the training runs that are tried.
_WEIGHT_BYTES = {"none": 2.0, "nf4": 0.5}
_SIZES = ((1, 512), (4, 512), (4, 2048))
_TARGETS = {"train": "step", "generate": "decode"}

Report = Callable[[str], None]


def suggest(
    gpu: Gpu, cases: Sequence[Case], count: int, forecasts: Forecasts, *, report: Report = lambda _: None
) -> list[Workload]:
    """Return the `count` runs, most telling first, that fit the card with room to spare, each shorter than a minute.

    Greedy: each run is the one whose prediction is least certain, given all measurements and the runs before it.
    """
    report(f"predicting candidates for {gpu.name}")
    known = {case.cell for case in cases}
    found = [
        (workload, forecast)
        for workload in _candidates(gpu)
        if f"{workload_id(workload)} {gpu.slug}" not in known and (forecast := _short(workload, gpu, forecasts))
    ]
    picked: list[Workload] = []
    while found and len(picked) < count:
        phase = "train" if len(picked) % 2 == 0 else "generate"
        own = [each for each in found if each[0].phase == phase] or found
        workload = _least_known(gpu, cases, own, [(w, forecasts.of(w, gpu.slug)) for w in picked])
        picked.append(workload)
        found = [each for each in found if each[0] is not workload]
    return picked


def _candidates(gpu: Gpu) -> Iterator[Workload]:
    """Yield what may be run: default models whose weights alone leave room on the card, in a few setups each."""
    for name in default_models():
        shape = load_model(name, offline=True)
        room = FULLEST * gpu.total_bytes / (shape.parameters or 1)
        stored = [quantization for quantization, each_bytes in _WEIGHT_BYTES.items() if each_bytes < room]
        for quantization, (batch, length), checkpointing in product(stored, _SIZES, (False, True)):
            yield Workload(
                model=name,
                config=shape.config,
                quantization=quantization,
                batch_size=batch,
                seq_len=length,
                checkpointing=checkpointing,
            )
        for quantization, batch in product(stored, (1, 8)):
            yield Workload(
                model=name,
                config=shape.config,
                phase="generate",
                quantization=quantization,
                batch_size=batch,
                prefill_len=512,
                decode_len=RUN_TOKENS,
            )


def _short(workload: Workload, gpu: Gpu, forecasts: Forecasts) -> Forecast | None:
    """Return the forecast of a run that fits and is short; None for others, and for what has no formula."""
    try:
        forecast = forecasts.of(workload, gpu.slug)
    except WhichloraError:
        return None
    predicted = forecast.predicted
    once_s = predicted["step"] * RUN_STEPS if workload.phase == "train" else predicted["decode"] * RUN_TOKENS
    return forecast if predicted["process"] <= FULLEST * gpu.total_bytes and once_s <= LONGEST_S else None


def _least_known(
    gpu: Gpu,
    cases: Sequence[Case],
    found: Sequence[tuple[Workload, Forecast]],
    picked: Sequence[tuple[Workload, Forecast]],
) -> Workload:
    """Return the candidate of largest variance under ridge regression: x (XᵀX + penalty)⁻¹ xᵀ."""
    import numpy as np

    phase = found[0][0].phase
    target = _TARGETS[phase]
    candidate = candidates(target)[-1]
    names = candidate.features
    own = [case for case in cases if case.target == target]
    raw = [[case.features[name] for name in names] for case in own]
    raw += [_features(workload, forecast, target, names) for workload, forecast in picked if workload.phase == phase]
    tried = np.array([_features(workload, forecast, target, names) for workload, forecast in found])
    everything = np.array(raw + tried.tolist())
    mean, spread = everything.mean(axis=0), np.maximum(everything.std(axis=0), 1e-9)

    def design(features: object, here: list[float]) -> np.ndarray[Any, np.dtype[np.float64]]:
        return np.column_stack([(np.array(features) - mean) / spread, here])

    seen = [float(case.gpu == gpu.slug) for case in own] + [1.0] * (len(raw) - len(own))
    information = candidate.penalty * np.eye(len(names) + 1)
    if raw:
        known = design(raw, seen)
        information += known.T @ known
    x = design(tried, [1.0] * len(found))
    variances = np.einsum("ij,jk,ik->i", x, np.linalg.inv(information), x)
    return found[int(np.argmax(variances))][0]


def _features(workload: Workload, forecast: Forecast, target: str, names: Sequence[str]) -> list[float]:
    found = time_features(workload, forecast.predicted[target])
    return [found[name] for name in names]
