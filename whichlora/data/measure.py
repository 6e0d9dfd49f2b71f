"""Lengths of a data set under a tokenizer, kept by content: what was tokenized once is not again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from whichlora_estimators.files import write_whole

from .formats import Sample
from .lengths import Lengths, from_lengths
from .rows import Subsets, load_rows
from .samples import load_samples
from .spec import DataSpec
from .tokens import character_ratio, encode, files_hash, find_tokenizer, load_tokenizer

#: One more with every change in how rows become tokens.
_VERSION = 1
_REPORT_EVERY = 5000
Report = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Lengths of the samples to train on, and how many samples each subset has."""

    train: Lengths
    validation: int
    test: int


def measure_lengths(
    spec: DataSpec,
    tokenizer: str,
    *,
    config: Mapping[str, Any] | None = None,
    offline: bool = False,
    report: Report = lambda _: None,
) -> Measured:
    """Measure a data set with a tokenizer: a folder, or an id of the Hub; `config` is that of the model.

    Where the tokenizer cannot be had, tokens are estimated from characters. Raises WhichloraError for data that cannot
    be read.
    """
    folder = find_tokenizer(tokenizer, offline=offline)
    if folder is None:
        report(f"no tokenizer at {tokenizer}: tokens are estimated from characters")
        return _estimated(spec, config or {}, offline=offline)
    kept = _cache_file(spec, folder, config or {}, offline=offline)
    if (known := _read(kept)) is not None:
        return known
    found = _tokenized(spec, folder, config or {}, offline=offline, report=report)
    _write(kept, found)
    return found


def _tokenized(spec: DataSpec, folder: Path, config: Mapping[str, Any], *, offline: bool, report: Report) -> Measured:
    loaded = load_tokenizer(folder)
    samples = load_samples(spec, config=config, tokenizer=loaded, offline=offline)
    lengths, learnt = [], 0
    for number, sample in enumerate(samples.train, 1):
        encoded = encode(sample, loaded)
        lengths.append(len(encoded.ids))
        learnt += len(encoded.ids) - (encoded.prompt_tokens if spec.completion_only else 0)
        if number % _REPORT_EVERY == 0:
            report(f"tokenized {number} of {len(samples.train)} samples")
    return _measured(samples, from_lengths(lengths, learnt=learnt))


def _estimated(spec: DataSpec, config: Mapping[str, Any], *, offline: bool) -> Measured:
    ratio = character_ratio(config)
    samples = load_samples(spec, config=config, offline=offline)
    lengths = [ratio.tokens(sample.text) for sample in samples.train]
    texts = [sample.completion if spec.completion_only else sample.text for sample in samples.train]
    learnt = sum(ratio.tokens(text) for text in texts)
    return _measured(samples, from_lengths(lengths, learnt=learnt, evidence="characters", error=ratio.error))


def _measured(samples: Subsets[Sample], train: Lengths) -> Measured:
    return Measured(train=train, validation=len(samples.validation), test=len(samples.test))


# --- the cache ---


def _cache_file(spec: DataSpec, folder: Path, config: Mapping[str, Any], *, offline: bool) -> Path:
    """Return where lengths are kept: named by a hash of the texts' source, of the tokenizer, and of what joins them."""
    rows = load_samples(spec, offline=offline) if spec.is_class else load_rows(spec, offline=offline)
    digest = hashlib.sha256(f"{_VERSION} {files_hash(folder)} {_format_key(spec, config)}".encode())
    for row in rows.train:
        digest.update(json.dumps(_plain(row), sort_keys=True, default=str).encode() + b"\n")
    digest.update(f"{len(rows.validation)} {len(rows.test)}".encode())
    return cache_folder() / "lengths" / f"{digest.hexdigest()}.json"


def _plain(row: Any) -> Any:
    return [row.prompt, row.completion] if isinstance(row, Sample) else dict(row)


def _format_key(spec: DataSpec, config: Mapping[str, Any]) -> str:
    columns = sorted(spec.columns.items())
    family = (config.get("model_type"), config.get("vocab_size"))
    return json.dumps([spec.format, columns, spec.completion_only, family])


def cache_folder() -> Path:
    """Return where what can be made anew is kept: $WHICHLORA_CACHE_DIR, or the user's cache folder's `whichlora`."""
    if chosen := os.environ.get("WHICHLORA_CACHE_DIR"):
        return Path(chosen).expanduser()
    xdg = Path(os.environ.get("XDG_CACHE_HOME") or "")
    return (xdg if xdg.is_absolute() else Path.home() / ".cache") / "whichlora"


def _read(path: Path) -> Measured | None:
    """Return what is kept; None where nothing is, or nothing that can be read."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        train = kept.pop("train")
        counts = {int(length): int(count) for length, count in train.pop("counts").items()}
        train["error"] = tuple(train["error"])
        return Measured(train=Lengths(counts=counts, **train), **kept)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _write(path: Path, found: Measured) -> None:
    train = {field.name: getattr(found.train, field.name) for field in fields(Lengths)}
    content = {"train": train, "validation": found.validation, "test": found.test}
    with suppress(OSError):  # a full or read-only disk costs time, not the answer
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole({path: json.dumps(content)})
