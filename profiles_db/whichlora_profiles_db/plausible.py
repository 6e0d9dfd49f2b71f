"""What no honest measurement can show: bounds that physics and arithmetic set, far enough out never to refuse one.

Not a judgement of quality: a row may be wrong by half and pass. Calibration weighs rows; this keeps out the absurd.

# L layers, D width, A attention width (heads x head width), F width of the feed-forward
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta, timezone
from functools import cache, lru_cache
from typing import Any

from whichlora_estimators.gpus import MatmulRates, all_gpus
from whichlora_estimators.workload import Workload

from .checks import is_plain
from .measurement import COUNTERS, TIMES, Measurement

#: A pebibyte: more than any machine's memory that one process addresses.
MOST_BYTES = 1 << 50
#: What a driver may add to a card out of the host's memory (paged optimizers, Windows' shared memory).
MOST_HOST_BYTES = 1 << 42
#: A launch alone takes longer than a tenth of a microsecond, and nobody waits a year for a step.
SHORTEST_S, LONGEST_S = 1e-7, 3.2e7
#: The first cards that compute on tensors were older than this, clocks that run ahead are off by less.
FIRST_YEAR, AHEAD = 2010, timedelta(days=2)
#: Room for boost clocks and for int8, which does twice the operations of 16 bit.
RATE_SLACK = 4.0
#: A publication may count what several cards did together, and quote seconds a token of a whole batch.
MOST_CARDS = 64
#: Four bits, the least that anybody stores a weight in.
LEAST_BYTES_A_PARAMETER = 0.5

_SLUG = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._+()-]{0,99}")
_LINES = ("gpu_name", "driver_version", "host_name", "cpu_name", "user_name", "os_name", "python_version")

_WIDTHS = ("hidden_size", "n_embd", "d_model")
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads")
_FEED_FORWARDS = ("moe_intermediate_size", "intermediate_size", "ffn_dim", "n_inner", "d_ff")


def implausible(measurement: Measurement, *, now: datetime | None = None) -> list[str]:
    """Return what of a measurement cannot be, in words; nothing for one that can."""
    found = (
        _names(measurement),
        _sizes(measurement),
        _peaks(measurement),
        _times(measurement),
        _moment(measurement, now),
    )
    return [reason for reasons in found for reason in reasons]


def _names(measurement: Measurement) -> Iterator[str]:
    """Look for what names are misused for: the folders of a remote, the terminal on which they are shown."""
    environment = measurement.environment
    if environment.gpu is not None and not _SLUG.fullmatch(environment.gpu):
        yield f"gpu is {environment.gpu[:80]!r}, which is no slug of a card"
    named = {name: getattr(environment, name) for name in _LINES} | {"model": measurement.workload.model}
    for name, text in (*named.items(), *(("versions", text) for pair in environment.versions.items() for text in pair)):
        if text is not None and not is_plain(text):
            yield f"{name} holds control characters or letters that are not seen: {text[:80]!r}"


def _sizes(measurement: Measurement) -> Iterator[str]:
    named = {name: getattr(measurement, name) for name in COUNTERS}
    named["gpu_total_bytes"] = measurement.environment.gpu_total_bytes
    for phase, peak in measurement.phase_peaks.items():
        named[f"peak of {phase[:40]!r}"] = max(peak.allocated_peak_bytes or 0, peak.reserved_peak_bytes or 0)
    for name, value in named.items():
        if (value or 0) > MOST_BYTES:
            yield f"{name} is {value}, above {MOST_BYTES}"


def _peaks(measurement: Measurement) -> Iterator[str]:
    if measurement.outcome != "ok":
        return
    peak = measurement.reserved_peak_bytes or measurement.allocated_peak_bytes
    total = measurement.environment.gpu_total_bytes
    if peak and total and peak > total + MOST_HOST_BYTES:
        yield f"a peak of {peak} bytes on a card of {total}"
    allocated = measurement.allocated_peak_bytes
    if allocated is None or measurement.evidence == "published":  # whose counters may mean something else
        return
    for name in ("weights_bytes", "model_bytes"):
        if allocated < (getattr(measurement, name) or 0):
            yield f"an allocated peak of {allocated} bytes below its {name}, {getattr(measurement, name)}"
    least = _least_weight_bytes(measurement.workload)
    if measurement.device != "cpu" and allocated < least:
        yield f"an allocated peak of {allocated} bytes where the weights alone take {least} or more"


def _times(measurement: Measurement) -> Iterator[str]:
    for name in TIMES:
        if (times := getattr(measurement, name)) is None:
            continue
        least = _least_s(measurement, name)
        given = [
            *times.samples_s,
            *(value for value in (times.min_s, times.median_s, times.max_s) if value is not None),
        ]
        shortest, longest = min([*given, times.mean_s or given[0]]), max([*given, times.mean_s or given[0]])
        if shortest < least:
            yield f"{name} of {shortest:.3g} s, below the {least:.3g} s that the card's rated FLOP/s allow"
        if longest > LONGEST_S:
            yield f"{name} of {longest:.3g} s, above a year"


def _moment(measurement: Measurement, now: datetime | None) -> Iterator[str]:
    moment = measurement.measured_at
    if moment is not None and moment.year < FIRST_YEAR:
        yield f"measured in {moment.year}"
    if moment is not None and moment > (now or datetime.now(timezone.utc)) + AHEAD:
        yield f"measured in the future: {moment:%Y-%m-%d}"


def _least_s(measurement: Measurement, name: str) -> float:
    """Return a time that no card beats: a forward pass's multiplications at several times the rated FLOP/s.

    Of a batch decoded together nothing but the launch is counted, as "a token" may mean one of any sample.
    """
    workload = measurement.workload
    tokens = {"step": workload.seq_len, "prefill": workload.prefill_len, "decode_per_token": 1}[name]
    if workload.task == "seq2seq":
        tokens = 1
    if name != "decode_per_token":
        tokens *= workload.batch_size
    flops = 2 * _least_parameters(workload) * tokens
    cards = MOST_CARDS if measurement.evidence == "published" else 1
    return float(max(SHORTEST_S, flops / (_rate(measurement.environment.gpu) * RATE_SLACK * cards)))


@cache
def _rate(slug: str | None) -> float:
    """Return the highest rated FLOP/s of a card, or of all cards where it is not one of ours."""
    rates = {gpu.slug: _highest(gpu.matmul_flops_per_s) for gpu in all_gpus()}
    return rates.get(slug or "", max(rates.values()))


def _highest(rates: MatmulRates) -> float:
    return max(rate for rate in (rates.bf16, rates.fp16, rates.tf32, rates.fp32) if rate)


def _least_weight_bytes(workload: Workload) -> int:
    kept_whole = 1.0 if workload.quantization == "none" else LEAST_BYTES_A_PARAMETER
    return int(_least_parameters(workload) * kept_whole)


def _least_parameters(workload: Workload) -> int:
    return _counted(*_dimensions(workload.config))


def _dimensions(config: Mapping[str, Any]) -> tuple[int, int, int, int]:
    inner = config.get("text_config")
    if isinstance(inner, Mapping):
        config = {**config, **inner}
    width, layers, heads = (_smallest(config, names) for names in (_WIDTHS, _LAYERS, _HEADS))
    head_width = _smallest(config, ("head_dim",))
    attention = min(width, heads * head_width) if heads and head_width else width // 2
    known = _known(config.get("model_type"))
    return (layers, width, attention, _smallest(config, _FEED_FORWARDS)) if known else (0, 0, 0, 0)


def _smallest(config: Mapping[str, Any], names: tuple[str, ...]) -> int:
    """Return the smallest of the sizes that `names` spell, 0 where none does."""
    given = [config[name] for name in names if isinstance(config.get(name), int) and 0 < config[name] < 1 << 40]
    return min(given, default=0)


@lru_cache(maxsize=4096)
def _counted(layers: int, width: int, attention: int, feed_forward: int) -> int:
    """Count what every layer of a family that we know has: query and output, and two products of one expert."""
    return layers * (2 * width * attention + 2 * width * feed_forward)


@cache
def _known(model_type: object) -> bool:
    """Say whether a family is one that we have a recipe for: others may share layers or have none of this."""
    from whichlora_estimators.families import all_families

    return isinstance(model_type, str) and model_type in all_families()
