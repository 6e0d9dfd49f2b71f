"""Reading a table of published rows (`benchmarks/published_rows.py` says of what form), and configs of models beside it."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.published_rows import Row, Shapes
from whichlora_estimators.errors import BadValue

#: What the mapping reads; a table may have more.
COLUMNS = (
    *(
        "run_id",
        "cell",
        "source",
        "model_id",
        "phase",
        "method",
        "quant",
        "rank",
        "target_modules",
        "dtype",
        "optimizer",
    ),
    *("micro_batch_size", "grad_accum", "seq_len", "grad_checkpointing", "attn_impl", "gpu", "n_gpus", "status"),
    *("mem_metric", "mem_value_bytes", "time_metric", "time_value", "n_tokens_or_samples", "software", "completeness"),
    *("trusted_for", "notes"),
)
#: Figures: positive numbers, or nothing.
FIGURES = ("mem_value_bytes", "time_value")


def read_table(path: Path) -> list[Row]:
    """Read the rows of a table. Raises BadValue for a file of another form, or a figure that is none; OSError."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, restval="")
            missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                todo = f"Give a CSV file with these columns too: {', '.join(missing)}."
                raise BadValue("no table of published rows", value=str(path), todo=todo)
            rows: list[Row] = [{name: row[name] for name in COLUMNS} for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise BadValue(f"no CSV in UTF-8 ({error})", value=str(path), todo="Give a table as text.") from None
    if not rows:
        raise BadValue("a table of published rows without rows", value=str(path), todo="Give at least one.")
    _check_figures(rows)
    return rows


def _check_figures(rows: Iterable[Row]) -> None:
    for line, row in enumerate(rows, start=2):
        for column in FIGURES:
            if row[column] and not _positive(row[column]):
                todo = "Give a positive number, or nothing."
                raise BadValue(
                    f"{column} of {row['run_id'] or f'row {line}'} is no figure", value=row[column], todo=todo
                )


def _positive(text: str) -> bool:
    try:
        return 0 < float(text) < math.inf
    except ValueError:
        return False


def read_shapes(path: Path | None) -> Shapes | None:
    """Read configs by model from a JSON file. Raises BadValue, OSError."""
    if path is None:
        return None
    try:
        known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadValue(
            f"no JSON ({error})", value=str(path), todo="Give an object: models and their configs."
        ) from None
    if not isinstance(known, dict) or not all(isinstance(config, dict) for config in known.values()):
        raise BadValue("no object of configs", value=str(path), todo="Give an object: models and their configs.")
    return known
