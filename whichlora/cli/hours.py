"""What `whichlora estimate` says of a whole training or a served answer: hours from lengths, money, strategies."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from whichlora_calibration import Prediction, TimeSpan, predict
from whichlora_estimators.errors import BadValue
from whichlora_estimators.estimate import step_times
from whichlora_estimators.lengths import (
    COLLATIONS,
    Lengths,
    epoch_of,
    lengths_from_histogram,
    lengths_from_mean,
    lengths_from_percentiles,
    lengths_of,
)
from whichlora_estimators.models import load_model
from whichlora_estimators.schedule import Training, training, widths_to_time
from whichlora_estimators.strategies import Answering, answering, speculative, with_examples
from whichlora_estimators.units import format_seconds
from whichlora_estimators.workload import Workload

F = TypeVar("F", bound=Callable[..., Any])
_JOULES_PER_KWH = 3.6e6

OPTIONS = (
    click.option("--samples", type=int, help="Samples an epoch trains on: adds the total time."),
    click.option("--epochs", type=int, default=1, show_default=True),
    click.option(
        "--lengths", metavar="FILE|TEXT", help="Tokens of the samples: a file of counts, or mean=210,p95=430."
    ),
    click.option(
        "--collate", type=click.Choice(COLLATIONS), default="pad", show_default=True, help="How samples become batches."
    ),
    click.option("--price-per-hour", type=float, help="Of the card: adds the price, in the currency that you give."),
    click.option("--energy", is_flag=True, help="Add the card's energy at its rated power."),
)
SERVING_OPTIONS = (
    click.option("--shots", type=int, default=0, show_default=True, help="Examples in front of each prompt."),
    click.option("--shot-tokens", type=int, default=200, show_default=True, help="Tokens an example."),
    click.option("--draft", metavar="MODEL", help="Compare with speculative decoding by this draft model."),
    click.option("--acceptance", type=float, default=0.7, show_default=True, help="Share of drafted tokens kept."),
    click.option("--draft-tokens", type=int, default=5, show_default=True, help="Tokens drafted at a time."),
)


def time_options(command: F) -> F:
    """Add the options of this module to a command."""
    for option in reversed(OPTIONS + SERVING_OPTIONS):
        command = option(command)
    return command


def read_lengths(options: dict[str, Any]) -> Lengths | None:
    """Return the data set's lengths, None where none were given. Raises BadValue for what says none."""
    for name in ("samples", "epochs"):
        if options[name] is not None and options[name] < 1:
            raise BadValue(f"{name} must be a positive whole number", value=options[name], todo="Give 1 or more.")
    if options["lengths"] is None:
        return None
    text, samples = options["lengths"], options["samples"]
    if re.search(r"=", text) and not Path(text).exists():
        return _described(text, samples)
    found = _read(Path(text))
    return found.scaled(samples) if samples else found


def _described(text: str, samples: int | None) -> Lengths:
    if samples is None:
        raise BadValue("a described distribution needs the number of samples", value=text, todo="Add --samples.")
    todo = "Write mean=210,p95=430 or percentiles: p5=80,p50=190,p95=430,p100=768."
    try:
        named = {name.strip(): float(value) for name, _, value in (part.partition("=") for part in text.split(","))}
        mean = named.pop("mean", None)
        percentiles = {float(name.removeprefix("p")): value for name, value in named.items()}
    except ValueError:
        raise BadValue("no distribution of lengths", value=text, todo=todo) from None
    if mean is None:
        return lengths_from_percentiles(percentiles, samples)
    if len(percentiles) != 1:
        raise BadValue("a mean goes with one percentile", value=text, todo=todo)
    ((percentile, tokens),) = percentiles.items()
    return lengths_from_mean(mean, samples, percentile=percentile, at_percentile_tokens=tokens)


def _read(path: Path) -> Lengths:
    """Read counts: numbers between spaces, commas or line ends; or JSON, a list or {tokens: samples}."""
    todo = "Give whole numbers, one a line, or JSON: a list, or an object from tokens to samples."
    try:
        text = path.read_text(encoding="utf-8")
        content = (
            json.loads(text)
            if text.lstrip().startswith(("[", "{"))
            else [int(n) for n in re.split(r"[\s,]+", text.strip())]
        )
        if isinstance(content, dict):
            return lengths_from_histogram({int(tokens): float(count) for tokens, count in content.items()})
        return lengths_of(content)
    except (OSError, UnicodeDecodeError) as error:
        raise BadValue("cannot read the lengths", value=str(path), todo=f"{error}.") from None
    except (ValueError, TypeError):
        raise BadValue("no lengths in this file", value=str(path), todo=todo) from None


def longest_batch(setup: dict[str, Any], lengths: Lengths | None, options: dict[str, Any]) -> dict[str, Any]:
    """Give a training setup the width of its longest batch, which decides memory; `seq_len` cuts samples."""
    if lengths is None or "seq_len" not in setup:
        return setup
    epoch = epoch_of(lengths, setup["batch_size"], collation=options["collate"], seq_len=setup["seq_len"])
    padded = options["collate"] != "pack" and setup["batch_size"] > 1 and len(epoch.widths) > 1
    return {**setup, "seq_len": epoch.longest_tokens, "padded": setup["padded"] or padded}


def whole_training(prediction: Prediction, lengths: Lengths | None, options: dict[str, Any]) -> Training | None:
    """Return what all epochs take, None where neither samples nor lengths were given."""
    workload, gpu = prediction.estimate.workload, prediction.estimate.gpu
    step_s, formula_s = prediction.expected.step_s, prediction.estimate.times.step_s
    if step_s is None or formula_s is None or (lengths is None and options["samples"] is None):
        return None
    equal = lengths is None
    known = lengths_from_histogram({workload.seq_len: options["samples"]}) if lengths is None else lengths
    batch_size = workload.batch_size * workload.accumulation
    epoch = epoch_of(known, batch_size, collation=options["collate"], seq_len=workload.seq_len)
    times = {workload.seq_len: step_s}
    if not equal:
        others = step_times(workload, gpu, (w for w in widths_to_time(known, epoch) if w not in times))
        times |= {width: seconds * step_s / formula_s for width, seconds in others.items()}
    shared = {"epochs": options["epochs"], "price_per_hour": options["price_per_hour"]}
    return training(epoch, times, gpu, **shared)


def training_cells(
    prediction: Prediction, found: Training | None, options: dict[str, Any], *, lengths: bool
) -> list[str]:
    """Lay out the columns that `training_headers` names."""
    if found is None:
        return []
    cells = [f"{found.epoch.padding_share:.0%}", f"{found.steps:,}"] if lengths else []
    cells.append(span(_total(prediction, found)))
    if options["energy"]:
        cells.append("-" if found.energy_j is None else f"{found.energy_j / _JOULES_PER_KWH:.2f} kWh")
    if found.price is not None:
        cells.append(f"{found.price:.2f}")
    return cells


def training_headers(options: dict[str, Any]) -> list[str]:
    """Name the columns of a whole training."""
    if options["samples"] is None and options["lengths"] is None:
        return []
    headers = ["padding", "steps"] if options["lengths"] is not None else []
    headers += ["total", *(["energy"] if options["energy"] else [])]
    return [*headers, *(["price"] if options["price_per_hour"] is not None else [])]


def _total(prediction: Prediction, found: Training) -> TimeSpan:
    """Return the span of all epochs: off by the share that a step is."""
    step = prediction.times["step"]
    return step.times(found.total_s / step.expected_s)


def training_json(prediction: Prediction, found: Training | None) -> dict[str, Any]:
    """Flatten a whole training for machines."""
    if found is None:
        return {}
    interval = _total(prediction, found)
    shown: dict[str, Any] = {
        "steps": found.steps,
        "epoch_s": found.epoch_s,
        "total_s": found.total_s,
        "total_interval_s": [interval.low_s, interval.high_s],
        "real_tokens": round(found.epochs * found.epoch.real_tokens),
        "computed_tokens": round(found.epochs * found.epoch.computed_tokens),
        "padding_share": found.epoch.padding_share,
        "longest_tokens": found.epoch.longest_tokens,
        "energy_j": found.energy_j,
        "price": found.price,
    }
    return {name: value for name, value in shown.items() if value is not None}


def span(found: TimeSpan | None) -> str:
    """Say a time and between what it lies: `120.0 ms (100.0 ms to 150.0 ms)`."""
    if found is None:
        return "-"
    return f"{format_seconds(found.expected_s)} ({format_seconds(found.low_s)} to {format_seconds(found.high_s)})"


# Serving ---------------------------------------------------------------------------------------------------------------


def with_shots(setup: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Lengthen the prompt by in-context examples."""
    if not options.get("shots") or "prefill_len" not in setup:
        return setup
    longer = with_examples(setup["prefill_len"], shots=options["shots"], shot_tokens=options["shot_tokens"])
    return {**setup, "prefill_len": longer}


def served(prediction: Prediction) -> Answering:
    """Return an answer's times."""
    workload, times = prediction.estimate.workload, prediction.expected
    return answering(times, batch_size=workload.batch_size, new_tokens=workload.decoded + 1)


def drafted(prediction: Prediction, options: dict[str, Any]) -> Answering | None:
    """Return an answer's times with the draft model, None where none is asked for."""
    if options["draft"] is None:
        return None
    if prediction.expected.decode_s_per_token is None:
        todo = "Leave out --draft, or give a --decode-len above 1 and a model that generates."
        raise BadValue("a draft guesses tokens, and none is decoded here", value=options["draft"], todo=todo)
    workload, gpu = prediction.estimate.workload, prediction.estimate.gpu
    shape = load_model(options["draft"], offline=options["offline"])
    draft = workload.with_(model=shape.name, config=shape.config, quantization="none")
    verify_s = _verify_s(workload, options["draft_tokens"], prediction)
    how = {"acceptance": options["acceptance"], "draft_tokens": options["draft_tokens"]}
    return speculative(served(prediction), served(predict(draft, gpu)), verify_s, **how)


def _verify_s(workload: Workload, draft_tokens: int, prediction: Prediction) -> float:
    """Return the seconds of one pass over the drafted tokens: a decode step of so many times as many sequences.

    Weights are read once and the products have as many rows; the cache is counted once for each token, a little too much.
    """
    several = workload.with_(batch_size=workload.batch_size * (draft_tokens + 1))
    times = predict(several, prediction.estimate.gpu).expected
    assert times.decode_s_per_token is not None
    return times.decode_s_per_token


def serving_json(prediction: Prediction, options: dict[str, Any]) -> dict[str, Any]:
    """Flatten an answer's times for machines, with and without a draft."""
    found = served(prediction)
    shown: dict[str, Any] = {"answer_s": found.total_s, "s_per_token": found.s_per_token}
    with_draft = drafted(prediction, options)
    if with_draft is not None:
        shown["speculative"] = {
            "draft": options["draft"],
            "acceptance": options["acceptance"],
            "draft_tokens": options["draft_tokens"],
            "decode_s_per_token": with_draft.decode_s_per_token,
            "answer_s": with_draft.total_s,
            "s_per_token": with_draft.s_per_token,
        }
    return shown
