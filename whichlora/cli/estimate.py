"""`whichlora estimate`: bytes and seconds by formula, one row per combination."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import click

from whichlora_calibration import CURRENT, Choice, Prediction, predict
from whichlora_estimators.errors import BadValue
from whichlora_estimators.gpus import find_gpu
from whichlora_estimators.models import load_model
from whichlora_estimators.stack import Stack, parse_stack
from whichlora_estimators.units import format_bytes, format_seconds
from whichlora_estimators.workload import ATTENTIONS, GENERATED, PRECISIONS, Workload

from ..api import SCHEMA, answer, answer_lines, make_workload
from ..notes import notes
from ..pickconfig import MethodChoice
from .asking import echo_answers, token_option
from .hours import (
    drafted,
    longest_batch,
    read_lengths,
    served,
    serving_json,
    span,
    time_options,
    training_cells,
    training_headers,
    training_json,
    whole_training,
    with_shots,
)
from .processor import echo_times, wants_processor
from .setup_options import generation_fields, setup_options, training_fields
from .tables import table

#: The card that a workload file is answered for unless one is named.
WORKLOADS_GPU = "a100-sxm-80gb"

correction_option = click.option(
    "--no-correction",
    "correction",
    flag_value=None,
    default=CURRENT,
    type=click.UNPROCESSED,
    help="The formula alone, without what `whichlora calibrate` learnt.",
)


@click.command()
@click.argument("models", nargs=-1, metavar="MODEL…")
@click.option(
    "--gpu", "gpus", multiple=True, help="Card, as `whichlora gpus` lists it; repeat for several. cpu: this processor."
)
@click.option(
    "--method", "methods", multiple=True, default=["lora"], show_default=True, help="Also qlora, dora, full, …"
)
@click.option(
    "--quantization", "quantizations", multiple=True, help="none, nf4, fp4 or int8 (default: none; nf4 for qlora)."
)
@click.option("--rank", "ranks", multiple=True, type=int, default=[16], show_default=True)
@click.option("--targets", default="all-linear", show_default=True, help="Names with commas between, or all-linear.")
@click.option(
    "--batch-size", "batch_sizes", multiple=True, type=int, default=[1], show_default=True, help="Micro-batch."
)
@click.option(
    "--seq-len", "seq_lens", multiple=True, type=int, default=[1024], show_default=True, help="Tokens a sample."
)
@click.option("--precision", type=click.Choice(PRECISIONS), default="bf16-true", show_default=True)
@click.option("--attention", type=click.Choice(ATTENTIONS), default="sdpa", show_default=True)
@click.option("--optimizer", default="adamw", show_default=True, help="adamw, adamw-fused, adamw-8bit, adafactor, …")
@click.option("--checkpointing/--no-checkpointing", default=None, help="Default: on above 1B parameters.")
@click.option("--dropout", type=float, default=0.0, show_default=True, help="Of the adapters.")
@click.option("--padded", is_flag=True, help="Some of the batch is padding, so that a mask is passed.")
@click.option("--generate", is_flag=True, help="Inference: generate, or with another --task classify.")
@click.option(
    "--prefill-len",
    "prefill_lens",
    multiple=True,
    type=int,
    default=[1024],
    show_default=True,
    help="Tokens of a prompt, or of a text that is classified.",
)
@click.option("--decode-len", type=int, default=128, show_default=True, help="New tokens, for --generate.")
@click.option("--all-logits", is_flag=True, help="Keep logits of every prompt position (before transformers 4.45).")
@setup_options
@click.option("--stack", default="", help="Library versions: torch==2.6.0,transformers==4.57.6 (default: newest).")
@time_options
@correction_option
@click.option("--explain", is_flag=True, help="Itemise each prediction at its peak.")
@click.option(
    "--workloads", type=click.Path(path_type=Path), help="Predict one workload per line of a JSON-lines file."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")
@click.option("--offline", is_flag=True, help="Do not ask the Hugging Face Hub.")
@click.option("--server", metavar="URL", help="Have a lab's `whichlora serve` predict, with its corrections.")
@token_option
def estimate(
    models: tuple[str, ...], gpus: tuple[str, ...], workloads: Path | None, as_json: bool, **options: Any
) -> None:
    """Predict peak memory and time of fine-tuning (or inference) of each MODEL on each GPU, by formula.

    A model is a bundled name, a Hugging Face id, a local folder or a config.json. The defaults are what practitioners
    use: LoRA of rank 16 on all linear layers, bf16 weights, sdpa attention, AdamW, checkpointing above 1B parameters.
    """
    if workloads is not None:
        _echo_workloads(workloads, gpus, as_json, parse_stack(options["stack"]), options["correction"])
        return
    if not models or not gpus:
        missing = "MODEL" if not models else "--gpu"
        raise BadValue(
            f"no {missing} given", todo="Example: whichlora estimate meta-llama/Llama-3.1-8B --gpu rtx-4090."
        )
    options["known_lengths"] = read_lengths(options)
    if options["server"] is not None:
        echo_answers(
            options["server"],
            options["token"],
            _requests(models, gpus, options),
            as_json=as_json,
            offline=options["offline"],
        )
        return
    stack = parse_stack(options["stack"])
    asked = list(combinations(models, options))
    tell_notes(asked, stack, set())
    if wants_processor(gpus):
        echo_times(asked, setup_text, as_json=as_json)
        return
    predictions = [
        predict(workload, find_gpu(gpu), stack=stack, correction=options["correction"])
        for workload in asked
        for gpu in dict.fromkeys(gpus)
    ]
    if as_json:
        click.echo(json.dumps({"schema": SCHEMA, "predictions": [_as_json(p, options) for p in predictions]}, indent=1))
        return
    click.echo(_table(predictions, options))
    if options["explain"]:
        for prediction in predictions:
            click.echo("\n" + explanation(prediction))


def _requests(models: tuple[str, ...], gpus: tuple[str, ...], options: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what a server is asked: the same combinations, in the same order."""
    return [
        {**longest_batch(with_shots(setup, options), options["known_lengths"], options), **place}
        for model in models
        for setup in setups(options)
        for gpu in dict.fromkeys(gpus)
        for place in [{"model": model, "gpu": gpu, "stack": options["stack"]}]
    ]


def combinations(models: tuple[str, ...], options: dict[str, Any]) -> Iterator[Workload]:
    """Yield the workload of each model and each combination of options; what is not in a model's numbers is told."""
    for name in models:
        shape = load_model(name, offline=options["offline"])
        if shape.caveat:
            click.echo(f"{shape.name}: {shape.caveat}", err=True)
        for setup in setups(options):
            setup = longest_batch(with_shots(setup, options), options.get("known_lengths"), options)
            yield make_workload(shape, **setup)


def tell_notes(workloads: Sequence[Workload], stack: Stack, told: set[str]) -> None:
    """Tell what one would not expect of workloads under a stack, but what was `told`."""
    for text, models in notes(workloads, stack).items():
        echo_new((f"{model}: {text}" for model in models), told)


def echo_new(lines: Iterable[str], told: set[str]) -> None:
    """Say on stderr what was not `told` yet, and remember it."""
    for line in lines:
        if line not in told:
            click.echo(line, err=True)
        told.add(line)


def setups(options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the fields of each workload that the options ask for."""
    shared = {key: options[key] for key in ("precision", "attention")}
    quantizations = options["quantizations"] or (None,)
    if options["generate"]:
        inference = product(quantizations, options["prefill_lens"], options["batch_sizes"])
        for quantization, prefill_len, batch_size in inference:
            yield {
                **shared,
                "phase": "generate",
                "quantization": quantization or "none",
                "prefill_len": prefill_len,
                "decode_len": options["decode_len"],
                "last_logits_only": not options["all_logits"],
                "batch_size": batch_size,
                **generation_fields(options),
            }
        return
    shared |= {key: options[key] for key in ("optimizer", "checkpointing", "dropout", "padded")}
    shared["targets"] = _targets(options["targets"])
    shared |= training_fields(options)
    grid = product(options["methods"], quantizations, options["ranks"], options["seq_lens"], options["batch_sizes"])
    for method, quantization, rank, seq_len, batch_size in grid:
        named = {} if quantization is None else {"quantization": quantization}
        yield {**shared, **named, "method": method, "rank": rank, "seq_len": seq_len, "batch_size": batch_size}


def _targets(text: str) -> str | tuple[str, ...]:
    return text if text == "all-linear" else tuple(part.strip() for part in text.split(",") if part.strip())


def _table(predictions: list[Prediction], options: dict[str, Any]) -> str:
    generating = options["generate"]
    headers = ["model", "gpu", "setup", "batch", "allocated", "reserved", "process", "verdict"]
    if generating:
        headers += ["prefill", "a token", "an answer", *(["drafted"] if options["draft"] else [])]
    else:
        headers += ["step", "tokens/s", *training_headers(options)]
    rows = [_cells(prediction, options) for prediction in predictions]
    return table([*headers, "evidence"], rows, right=range(3, 7))


def _cells(prediction: Prediction, options: dict[str, Any]) -> list[str]:
    found = prediction.estimate
    workload = found.workload
    memory = (each.expected_bytes for each in (prediction.allocated, prediction.reserved, prediction.process))
    cells = [workload.model, found.gpu.slug, setup_text(workload), str(workload.batch_size), *map(format_bytes, memory)]
    cells.append(prediction.verdict.value)
    if workload.phase == "generate":
        cells += _serving_cells(prediction, options)
    else:
        lengths = options["known_lengths"]
        cells += [span(prediction.times.get("step")), f"{prediction.tokens_per_s or 0:,.0f}"]
        cells += training_cells(
            prediction, whole_training(prediction, lengths, options), options, lengths=lengths is not None
        )
    return [*cells, evidence(prediction)]


def evidence(prediction: Prediction) -> str:
    """Name the evidence of the bytes, and that of the times where it is another."""
    of_times = {span.evidence for span in prediction.times.values()} - {prediction.evidence}
    return ", ".join([prediction.evidence, *(f"times {each}" for each in sorted(of_times))])


def setup_text(workload: Workload) -> str:
    """Say in a few words what is run: method, rank, length."""
    if workload.phase == "generate":
        stored = "" if workload.quantization == "none" else f" {workload.quantization}"
        if workload.task not in GENERATED:
            return f"{workload.task}{stored} s{workload.prefill_len}"
        return f"generate{stored} {workload.prefill_len}+{workload.decode_len}"
    name = MethodChoice(method=workload.method, quantization=workload.quantization).label
    rank = "" if workload.method == "full" else f" r{workload.rank}"
    return f"{name}{rank} s{workload.seq_len}{' ckpt' if workload.checkpointing else ''}"


def _serving_cells(prediction: Prediction, options: dict[str, Any]) -> list[str]:
    times, with_draft = prediction.times, drafted(prediction, options)
    cells = [span(times.get("prefill")), span(times.get("decode"))]
    answers = [found for found in (served(prediction), with_draft) if found is not None]
    return cells + [format_seconds(found.total_s) for found in answers]


def _as_json(prediction: Prediction, options: dict[str, Any]) -> dict[str, Any]:
    workload = prediction.estimate.workload
    kept = ["phase", "quantization", "precision", "attention", "batch_size"]
    trains = workload.phase == "train"
    if trains:
        kept += ["method", "rank", "optimizer", "checkpointing", "seq_len"]
    else:
        kept += ["task", "prefill_len", "decode_len"]
    if trains:
        more = training_json(prediction, whole_training(prediction, options["known_lengths"], options))
    else:
        more = serving_json(prediction, options)
    return {**{name: getattr(workload, name) for name in kept}, **answer(prediction), **more}


def explanation(prediction: Prediction) -> str:
    """Itemise a prediction: process bytes by component at the peak, the phase of the peak, the interval."""
    found = prediction.estimate
    rows = sorted(found.breakdown.items(), key=lambda item: -item[1])
    total = found.process_bytes
    expected = prediction.process.expected_bytes
    corrected = [] if prediction.evidence == "formula" else [("corrected", format_bytes(expected), "")]
    lines = [(name, format_bytes(size), f"{100 * size / total:.1f}%") for name, size in rows]
    head = (
        f"{found.workload.model} on {found.gpu.name}, {setup_text(found.workload)}, batch {found.workload.batch_size}"
    )
    low, high = format_bytes(prediction.process.low_bytes), format_bytes(prediction.process.high_bytes)
    return "\n".join(
        [
            head,
            f"peak of allocated bytes in {found.peak.phase}",
            table(
                ("component", "bytes", "share"),
                [*lines, ("process", format_bytes(total), ""), *corrected],
                right=(1, 2),
            ),
            f"process bytes between {low} and {high} with {prediction.process.coverage:.0%} probability;"
            f" the card has {format_bytes(found.gpu.total_bytes)}: {prediction.verdict.value}",
            f"trainable parameters: {found.trainable_params:,}",
        ]
    )


def _echo_workloads(path: Path, gpus: tuple[str, ...], as_json: bool, stack: Stack, correction: Choice) -> None:
    gpu = find_gpu(gpus[0] if gpus else WORKLOADS_GPU)
    if not gpus:
        click.echo(f"times and context are those of {gpu.name}; --gpu names another card", err=True)
    told: set[str] = set()
    for found in answer_lines(read_lines(path), gpu, stack=stack, correction=correction):
        echo_new((f"{found['model']}: {text}" for text in found.get("caveats", ())), told)
        if as_json:
            click.echo(json.dumps(found))
        elif "error" in found:
            click.echo(f"{found['id']}: refused: {found['error']}")
        else:
            allocated, reserved = (
                format_bytes(found[f"{counter}_peak_bytes"]) for counter in ("allocated", "reserved")
            )
            click.echo(f"{found['id']}: {found['model']}: {allocated} allocated, {reserved} reserved")


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Read a workload file, one JSON object a line. Raises BadValue that names the line."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadValue("cannot read the workload file", value=str(path), todo=f"{error}.") from None
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except ValueError as error:
            raise BadValue(f"line {number} of {path} is not JSON", value=line[:60], todo=f"{error}.") from None
        if not isinstance(fields, dict):
            raise BadValue(f"line {number} of {path} is not an object", value=line[:60], todo="One workload a line.")
        yield fields
