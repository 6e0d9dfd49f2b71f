"""`whichlora data`: how long the samples of a data set are in tokens, and what that means for `seq_len` and batches."""

from __future__ import annotations

import json
from typing import Any

import click

from whichlora_estimators.errors import BadValue
from whichlora_estimators.lengths import COLLATIONS, Epoch
from whichlora_estimators.models import load_model

from ..data import FORMATS, Lengths, advise_seq_len, data_from_fields, measure_lengths
from ..data.lengths import positions_of
from ..data.measure import Measured
from .tables import table

SCHEMA = 1
_QUANTILES = (0.5, 0.9, 0.99)


@click.command()
@click.argument("source", metavar="FILE|DATASET|MODULE:CLASS")
@click.option("--model", required=True, help="Model: its tokenizer counts, its family decides the format of questions.")
@click.option("--tokenizer", help="Another tokenizer than the model's: a folder, or an id of the Hub.")
@click.option("--subset", help="Subset of a data set of the Hub.")
@click.option("--format", "format_", type=click.Choice(FORMATS), default="auto", show_default=True)
@click.option("--column", "columns", multiple=True, metavar="OURS=YOURS", help="Name of a column; repeatable.")
@click.option("--all-tokens", is_flag=True, help="Learn prompts too, not completions alone.")
@click.option("--seq-len", type=click.IntRange(min=1), help="Sequence length to look at (default: the advised one).")
@click.option("--batch-size", "batch_sizes", type=click.IntRange(min=1), multiple=True, default=(1, 4, 16))
@click.option("--offline", is_flag=True, help="Do not ask the Hugging Face Hub.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")
def data(source: str, model: str, tokenizer: str | None, **options: Any) -> None:
    """Measure a data set: a file (JSON lines, CSV, Parquet, Arrow), an id of the Hub, or a BaseDataset.

    What was tokenized once is kept by content. Where no tokenizer can be had, tokens are estimated from characters, and
    the error of that is said.
    """
    shape = load_model(model, offline=options["offline"])
    fields = {"source": source, "subset": options["subset"], "format": options["format_"]}
    fields |= {"columns": _columns(options["columns"]), "completion_only": not options["all_tokens"]}
    spec = data_from_fields(fields)
    assert spec
    measured = measure_lengths(
        spec,
        tokenizer or str(model),
        config=shape.config,
        offline=options["offline"],
        report=lambda text: click.echo(text, err=True),
    )
    advice = advise_seq_len(measured.train, limit=positions_of(shape.config))
    seq_len = options["seq_len"] or advice[0]
    if options["as_json"]:
        click.echo(json.dumps(_answer(measured, advice, seq_len, options["batch_sizes"]), indent=1))
    else:
        click.echo(_text(measured, advice, seq_len, options["batch_sizes"]))


def _columns(given: tuple[str, ...]) -> dict[str, str]:
    pairs = [text.partition("=") for text in given]
    for ours, equals, theirs in pairs:
        if not (ours and equals and theirs):
            raise BadValue("not a column", value=ours, todo="Write OURS=YOURS, such as prompt=instruction.")
    return {ours: theirs for ours, _, theirs in pairs}


def _answer(measured: Measured, advice: tuple[int, str], seq_len: int, batch_sizes: tuple[int, ...]) -> dict[str, Any]:
    train = measured.train
    return {
        "schema": SCHEMA,
        "evidence": train.evidence,
        "error": list(train.error),
        "samples": {"train": train.samples, "validation": measured.validation, "test": measured.test},
        "tokens": train.tokens,
        "learnt_tokens": train.learnt,
        "longest": train.longest,
        "mean": train.mean,
        "quantiles": {str(share): train.quantile(share) for share in _QUANTILES},
        "lengths": {str(length): train.counts[length] for length in sorted(train.counts)},
        "advised_seq_len": advice[0],
        "why": advice[1],
        "seq_len": seq_len,
        "cut_samples": train.cut(seq_len)[0],
        "packed_sequences": train.blocks(seq_len),
        "epochs": {
            how: {str(size): _epoch(train.epoch(size, collation=how, seq_len=seq_len)) for size in batch_sizes}
            for how in COLLATIONS
        },
    }


def _epoch(found: Epoch) -> dict[str, int]:
    return {
        "passes": found.steps,
        "real_tokens": round(found.real_tokens),
        "computed_tokens": round(found.computed_tokens),
    }


def _text(measured: Measured, advice: tuple[int, str], seq_len: int, batch_sizes: tuple[int, ...]) -> str:
    train = measured.train
    quantiles = ", ".join(f"{share:.0%} up to {train.quantile(share)}" for share in _QUANTILES)
    lines = [
        f"samples: {train.samples} to train on, {measured.validation} to validate, {measured.test} to test",
        f"tokens: {train.tokens} in all, {train.learnt} of them learnt; counted by {_evidence(train)}",
        f"length: mean {train.mean:.1f}; {quantiles}; longest {train.longest}",
        f"advised seq_len: {advice[0]} ({advice[1]})",
        "",
        f"One epoch at seq_len {seq_len}: {train.cut(seq_len)[0]} samples cut off",
    ]
    return "\n".join([*lines, _epochs(train, seq_len, batch_sizes)])


def _evidence(train: Lengths) -> str:
    if train.evidence == "tokenizer":
        return "the tokenizer"
    low, high = train.error
    return f"characters a token (an estimate; nine in ten English texts or code are within {low:+.0%} and {high:+.0%})"


def _epochs(train: Lengths, seq_len: int, batch_sizes: tuple[int, ...]) -> str:
    """Lay out what an epoch is in batches of several sizes, collated in every way that there is."""
    rows = []
    for how in COLLATIONS:
        for size in batch_sizes:
            found = train.epoch(size, collation=how, seq_len=seq_len)
            rows.append(
                (how, str(size), f"{found.steps}", f"{found.computed_tokens:.0f}", f"{found.padding_share:.1%}")
            )
    return table(("collated", "batch", "batches", "tokens", "padding"), rows, right=range(1, 5))
