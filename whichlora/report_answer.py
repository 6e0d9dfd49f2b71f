"""The words and numbers of the report: the answer in a sentence, its numbers, what fills the card, what was assumed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from html import escape

from whichlora_calibration import Interval, Prediction, TimeSpan
from whichlora_estimators.gpus import context_bytes
from whichlora_estimators.methods import find_method
from whichlora_estimators.units import format_bytes, format_seconds

from .pick import PickResult, Row, memory_limit
from .pickconfig import CHECKPOINTING_ABOVE, PickConfig
from .plan import misses, survivors
from .report_training import training_facts
from .report_view import (
    batch_of,
    batch_text,
    card_memory,
    describe,
    format_count,
    format_limit,
    format_range,
    format_span,
    format_time,
    method_name,
)

#: Misses that the page names where nothing satisfies the limits; the table of models has the others.
NAMED_MISSES = 3


def title(result: PickResult) -> str:
    """Name the page for a browser's tab."""
    if result.choice is None:
        return f"whichlora: nothing fits on {result.config.gpu.name}"
    return f"whichlora: {result.choice.model} on {result.config.gpu.name}"


# --- the answer ---


def headline(result: PickResult) -> str:
    """Say in a sentence what was chosen or that nothing fits, and in a few more what that means."""
    if result.choice is None or result.prediction is None:
        return _header(result, "Nothing satisfies every limit.", escape(_funnel(result)) + _named_misses(result))
    workload = result.choice.workload
    method = escape(method_name(workload.method, workload.quantization))
    rank = f", rank {workload.rank}" if find_method(workload.method).has_rank else ""
    variant = f", {escape(result.choice.variant)}" if result.choice.variant else ""
    sentence = (
        f"Fine-tune <strong>{escape(result.choice.model)}</strong> with <strong>{method}</strong>{rank}{variant},"
        f" at {batch_text(result.choice)}."
    )
    return _header(result, sentence, escape(f"{_cost(result, result.choice, result.prediction)} {_funnel(result)}"))


def _header(result: PickResult, sentence: str, detail: str) -> str:
    kicker = f"whichlora pick · {escape(result.config.gpu.name)}"
    return f'<header>\n<p class="kicker">{kicker}</p>\n<h1>{sentence}</h1>\n<div class="lead">{detail}</div>\n</header>'


def _cost(result: PickResult, choice: Row, prediction: Prediction) -> str:
    config = result.config
    if config.samples is None:
        time = f"A step takes about {format_span(choice.step)}"
    else:
        epochs = "one epoch" if config.epochs == 1 else f"{config.epochs} epochs"
        time = f"That takes about {format_span(choice.time)} for {epochs} of {config.samples:,} samples"
    used = format_bytes(prediction.estimate.process_bytes)
    return f"{time}, and {used} of the card ({_between(prediction.process)})."


def _between(interval: Interval) -> str:
    low, high = format_bytes(interval.low_bytes), format_bytes(interval.high_bytes)
    return f"{low} to {high} with {interval.coverage:.0%} probability"


def _funnel(result: PickResult) -> str:
    tried, kept = len({row.model for row in result.stage1}), len(result.kept)
    tuned = len({row.model for row in survivors(result)})
    text = f"Of {tried} model{'' if tried == 1 else 's'} tried, {kept} can serve within the limits"
    if kept:
        text += f", and {tuned} of those can be fine-tuned within theirs"
    return text + ("; none of them is larger than this one." if tuned > 1 else ".")


def _named_misses(result: PickResult) -> str:
    lines = [
        f"<li><strong>{escape(row.model)}</strong>"
        f"{'' if batch_of(row) is None else ' with ' + escape(describe(row))}: {escape('; '.join(row.rejected))}</li>"
        for row in misses(result)[:NAMED_MISSES]
    ]
    return f"<p>What came closest:</p><ul>{''.join(lines)}</ul>" if lines else ""


# --- what was asked ---


def asked(result: PickResult) -> str:
    """List the card and the limits, in the units that they were given in."""
    config = result.config
    stage1, stage2, card_bytes = config.stage1, config.stage2, config.gpu.total_bytes
    serving = [f"memory up to {format_limit(memory_limit(config, 'generate'), card_bytes)}"]
    tuning = [f"memory up to {format_limit(memory_limit(config, 'train'), card_bytes)}"]
    if stage1.time_per_token_s is not None:
        serving.append(f"up to {format_seconds(stage1.time_per_token_s)} a token")
    if stage2.total_time_s is not None:
        tuning.append(f"up to {format_seconds(stage2.total_time_s)} in all")
    facts = {
        "Card": f"{config.gpu.name}: {card_memory(config.gpu)}",
        "Serving": ", ".join(serving),
        "Fine-tuning": ", ".join(tuning),
        "Tried": f"{len(result.stage1):,} inference and {len(result.stage2):,} fine-tuning configurations",
    }
    items = "".join(f"<div><dt>{name}</dt><dd>{escape(text)}</dd></div>" for name, text in facts.items())
    return f'<dl class="facts">{items}</dl>'


# --- numbers of the choice ---


def numbers(result: PickResult, choice: Row, prediction: Prediction) -> str:
    """Show each predicted number of the choice with its interval, its limit and its evidence."""
    cards = "\n".join(
        f'<div class="card"><p class="name">{escape(name)}</p><p class="value">{escape(value)}</p>'
        f'<p class="note">{escape(note)}</p><p class="chip">{escape(evidence)}</p></div>'
        for name, value, note, evidence in (*_seen(result, choice), *_cards(result, choice, prediction))
    )
    return f'<div class="cards">\n{cards}\n</div>'


def _seen(result: PickResult, choice: Row) -> Iterator[tuple[str, str, str, str]]:
    """Show what the choice took when it was rehearsed or measured, if it was."""
    if not choice.seen or choice.process_bytes is None:
        return
    limit = f"limit {format_bytes(memory_limit(result.config, 'train'))}"
    yield "Process bytes as seen", format_bytes(choice.process_bytes[1]), limit, choice.evidence
    if choice.allocated_peak_bytes is not None:
        yield "Allocated peak as seen", format_bytes(choice.allocated_peak_bytes), "", choice.evidence


def _cards(result: PickResult, choice: Row, prediction: Prediction) -> Iterator[tuple[str, str, str, str]]:
    """Show what is predicted."""
    for name, value, note in _bytes_cards(result, prediction):
        yield name, value, note, prediction.evidence
    for name, value, note in _time_cards(result, choice, prediction):
        yield name, value, note, "formula" if choice.step is None else choice.step.evidence
    trained = prediction.estimate.trainable_params
    share = f"{trained / choice.parameters:.2%} of {format_count(choice.parameters)}"
    yield "Trainable parameters", format_count(trained), share, "formula"


def _bytes_cards(result: PickResult, prediction: Prediction) -> Iterator[tuple[str, str, str]]:
    found, config = prediction.estimate, result.config
    context = found.context_bytes
    process = prediction.process
    reserved = f"{format_bytes(process.low_bytes - context)} to {format_bytes(process.high_bytes - context)}"
    limit = format_bytes(memory_limit(config, "train"))
    yield "Process bytes", format_bytes(found.process_bytes), f"{_between(process)}; limit {limit}"
    yield "Allocated peak", format_bytes(found.allocated_peak_bytes), _between(prediction.allocated)
    yield (
        "Reserved peak",
        format_bytes(found.reserved_peak_bytes),
        f"{reserved} with {process.coverage:.0%} probability",
    )


def _time_cards(result: PickResult, choice: Row, prediction: Prediction) -> Iterator[tuple[str, str, str]]:
    found = prediction.estimate
    yield "Time of a step", format_time(choice.step_s), f"{_probably(choice.step)}, on the longest batch"
    if choice.schedule is not None and choice.time is not None:
        schedule, limit_s = choice.schedule, result.config.stage2.total_time_s
        within = "no limit" if limit_s is None else f"limit {format_seconds(limit_s)}"
        yield "Time in all", format_time(choice.time_s), f"{_probably(choice.time)}; {within}"
        real = schedule.epochs * schedule.real_tokens / choice.time.expected_s
        note = (
            f"{schedule.padding_share:.1%} of what is computed is padding" if schedule.padding_share else "no padding"
        )
        yield "Throughput", f"{real:,.0f} tokens/s", f"{schedule.total_steps:,} steps; {note}"
    elif found.tokens_per_s is not None:
        yield "Throughput", f"{found.tokens_per_s:,.0f} tokens/s", "padding counts as tokens"


def _probably(span: TimeSpan | None) -> str:
    if span is None:
        return "no interval is known"
    return format_range(span) + (f" with {span.coverage:.0%} probability" if span.coverage < 1 else ", as timed")


def training(result: PickResult) -> str:
    """List what the chosen training consists of; empty without a data set."""
    facts = list(training_facts(result))
    items = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in facts)
    return f'<section>\n<h2>The training</h2>\n<dl class="facts">{items}</dl>\n</section>' if facts else ""


# --- what fills the card ---


def breakdown(result: PickResult, prediction: Prediction) -> str:
    """Draw the predicted process bytes at the peak as one bar as long as the card, its components named below."""
    found = prediction.estimate
    card_bytes, limit_bytes = result.config.gpu.total_bytes, memory_limit(result.config, "train")
    parts = sorted(((n, s) for n, s in found.breakdown.items() if s > 0), key=lambda part: -part[1])
    bar = "".join(
        f'<span class="c{i}" style="width:{100 * size / card_bytes:.3f}%" title="{escape(name)}: {format_bytes(size)}">'
        "</span>"
        for i, (name, size) in enumerate(parts)
    )
    legend = "".join(
        f'<li><i class="c{i}"></i>{escape(name)} <b>{format_bytes(size)}</b></li>'
        for i, (name, size) in enumerate(parts)
    )
    free = max(0, card_bytes - found.process_bytes)
    where, mark = f"The peak of allocated bytes is in “{found.peak.phase}”.", ""
    if limit_bytes < card_bytes:
        where += f" Dashed: the limit of {format_bytes(limit_bytes)}."
        mark = f'<em style="left:{100 * limit_bytes / card_bytes:.3f}%" title="limit"></em>'
    label = f"Of {format_bytes(card_bytes)}, {format_bytes(found.process_bytes)} are in use"
    return (
        f'<section>\n<h2>What fills the card</h2>\n<p class="note">{escape(where)}</p>\n'
        f'<div class="memory" role="img" aria-label="{escape(label)}">{bar}{mark}</div>\n'
        f'<ul class="legend">{legend}<li><i class="free"></i>free <b>{format_bytes(free)}</b></li></ul>\n</section>'
    )


# --- what was assumed ---


def assumptions(result: PickResult) -> str:
    """List what the numbers rest on, and what they do not say."""
    items = "\n".join(f"<li>{escape(text)}</li>" for text in _assumptions(result.config))
    return f"<section>\n<h2>What was assumed</h2>\n<ul>\n{items}\n</ul>\n</section>"


def _assumptions(config: PickConfig) -> Iterator[str]:
    gpu = config.gpu
    yield (
        "Accuracy is not predicted. The largest model that satisfies the limits is taken, because within a family"
        " larger models tend to be better; whether this one suits the task only an evaluation tells."
    )
    yield (
        f"Configurations that satisfy every limit are compared by {', '.join(config.policy)}, in this order: the largest"
        " model; the least lossy weights (unquantized, int8, then 4 bit); the method named first in the config; the"
        " higher rank; the largest useful batch, which no smaller one clearly beats in time; the least time."
    )
    yield (
        f"All numbers are for one {gpu.name} ({card_memory(gpu)}; {gpu.hbm_bytes_per_s / 1e9:,.0f} GB/s), by formula but"
        " where the tables say that they were rehearsed or measured. No weights are needed for that."
    )
    yield (
        f"Beside what PyTorch reserves, a process holds {format_bytes(context_bytes(gpu))} on this card: the CUDA"
        " context and the libraries' kernels. Other processes and the screen are not counted."
    )
    yield from _training_assumptions(config)
    which = "all of its configurations keep" if config.stage1.satisfy == "all" else "any configuration keeps"
    stored = "not quantized" if config.stage1.quantization == "none" else f"quantized to {config.stage1.quantization}"
    yield (
        f"Inference in {config.precision}, {stored}, attention {config.attentions[0]}. Time per token is prefill and"
        " decoding together over all tokens generated, of all sequences in the batch."
        f" A model serves if {which} the limits."
    )
    yield (
        "A range of process bytes goes from live bytes and context, if the allocator wastes nothing, to the allocator's"
        " usual slack. The full prediction of the choice replays the allocator, so that its interval is narrower."
        " Limits in GB count 10⁹ bytes, all other numbers GiB of 2³⁰."
    )


def _training_assumptions(config: PickConfig) -> Iterator[str]:
    above = {
        None: f"checkpointing of activations for models above {format_count(CHECKPOINTING_ABOVE)} parameters",
        True: "checkpointing of activations",
        False: "no checkpointing of activations",
    }
    targets = (each if isinstance(each, str) else "+".join(each) for each in config.targets)
    yield (
        f"Fine-tuning in {config.precision}, attention {_or(config.attentions)}, optimizer {_or(config.optimizers)},"
        f" {_or(above[each] for each in config.checkpointing)}, adapters on {_or(targets)}, dropout {config.dropout:g}."
    )
    yield (
        "A step is that of Transformers' Trainer, which lets the model's output go before backward and clips gradients"
        f" ({'not here' if config.training.clip_grad_norm is None else f'at {config.training.clip_grad_norm:g}'})."
    )
    equal = f"Every sample is {config.seq_len:,} tokens long"
    if config.samples is None:
        yield f"{equal}. The config names no data set, so that times are those of a step."
        return
    length = (
        "Memory is that of the longest batch, time that of all tokens with their padding" if config.lengths else equal
    )
    epochs = f"{config.epochs} epoch{'' if config.epochs == 1 else 's'}"
    yield f"{length}; {config.samples:,} samples, {epochs}. Loading, evaluation and saving take no time here."
    if any(found.evidence != "tokenizer" for found in config.lengths.values()):
        yield (
            "Tokens of some models were estimated from characters, since their tokenizers were not to be had: the longest"
            " sample counts as long as it may be; the error of all tokens together is in no interval."
        )


def _or(alternatives: Iterable[str]) -> str:
    return " or ".join(alternatives)
