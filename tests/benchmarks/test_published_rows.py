"""The mapping of published rows to workloads: what is taken, what is refused, and how errors are weighed."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.published import Compared, answer, compare, errors, main, weighted_quantile
from benchmarks.published_questions import Reasons, of_pack, of_table
from benchmarks.published_rows import ALLOCATED, Row, Unmapped, map_row
from benchmarks.published_table import COLUMNS, read_table
from whichlora_estimators.errors import BadValue
from whichlora_profiles_db import published

#: One row as fms-acceleration's table of 2025-02-07 gives it (scripts/benchmarks/refs/a100_80gb.csv, commit 24bdadb).
FMS = {
    "run_id": "fms|a100_80gb@2025-02-07|mistralai/Mistral-7B-v0.1|none|lora|bs4",
    "cell": "fms|mistralai/Mistral-7B-v0.1|lora|bs4",
    "source": "foundation-model-stack/fms-acceleration a100_80gb@2025-02-07@24bdadb.csv",
    "model_id": "mistralai/Mistral-7B-v0.1",
    "phase": "train",
    "method": "lora",
    "quant": "none",
    "rank": "16",
    "target_modules": "q_proj k_proj v_proj o_proj",
    "dtype": "bfloat16 pure",
    "optimizer": "AdamW torch (HF Trainer default)",
    "micro_batch_size": "4",
    "grad_accum": "1",
    "seq_len": "packed 4096 (tokens/s x runtime / steps / batch = 4096)",
    "grad_checkpointing": "yes",
    "attn_impl": "flash_attention_2",
    "gpu": "A100-SXM4-80GB",
    "n_gpus": "1",
    "status": "ok",
    "mem_metric": "max_allocated",
    "mem_value_bytes": "26704571904",
    "time_metric": "train tokens/s (HF Trainer, whole run 100 steps)",
    "time_value": "3000",
    "software": "torch 2.4.1; transformers 4.48.1; peft 0.13.2; bnb 0.43.3; trl 0.13.0",
    "completeness": "A",
    "trusted_for": "memory time",
    "notes": "framework_config=none; batch token length 4096; standard HF kernels",
}


def row(**changes: str) -> Row:
    return FMS | changes


def test_a_row_becomes_the_workload_that_its_source_ran() -> None:
    """Lengths, targets, checkpointing, versions, date and seconds of a step are those of the source."""
    mapped = map_row(row())
    workload = mapped.workload
    assert (workload.method, workload.rank, workload.batch_size, workload.seq_len) == ("lora", 16, 4, 4096)
    assert workload.targets == ("q_proj", "k_proj", "v_proj", "o_proj")
    assert (workload.precision, workload.checkpointing, workload.dropout) == ("bf16-true", True, 0.1)
    assert (mapped.counter, mapped.measured_bytes, mapped.gpu.slug) == (ALLOCATED, 26704571904, "a100-sxm-80gb")
    assert mapped.time is not None
    assert mapped.time.seconds == pytest.approx(4 * 4096 / 3000)
    assert dict(mapped.environment.versions) == {
        "bitsandbytes": "0.43.3",
        "peft": "0.13.2",
        "torch": "2.4.1",
        "transformers": "4.48.1",
        "trl": "0.13.0",
    }
    assert mapped.measured_at is not None
    assert mapped.measured_at.isoformat().startswith("2025-02-07")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"completeness": "C"}, "class C"),
        ({"source": "somebody's table"}, "no mapping"),
        ({"n_gpus": "2"}, "several GPUs"),
        ({"quant": "gptq-int4"}, "gptq-int4"),
        ({"dtype": "fp8"}, "dtype"),
        ({"notes": "framework_config=foak-fast-kernels; x"}, "foak"),
        ({"gpu": "unknown"}, "unknown GPU"),
        ({"gpu": ""}, "no card"),
        ({"model_id": "nobody/nothing"}, "nobody/nothing"),
        ({"micro_batch_size": "many"}, "many"),
        ({"grad_checkpointing": "unknown"}, "grad_checkpointing"),
        ({"method": "oft"}, "oft"),
    ],
)
def test_what_needs_a_guess_is_refused_with_the_reason(changes: dict[str, str], told: str) -> None:
    """A row that leaves open what ran is not mapped, whatever it leaves open, and never crashes the rest."""
    with pytest.raises(Unmapped, match=told):
        map_row(row(**changes))


def test_versions_that_are_ranges_are_unknown() -> None:
    """Only a version that is given exactly is taken over."""
    software = "torch 2.2.x; transformers 4.43-4.44; peft 0.12/0.13; optimum-benchmark 450f5b81"
    assert dict(map_row(row(software=software)).environment.versions) == {"optimum-benchmark": "450f5b81"}


def test_rows_that_may_not_judge_are_not_asked() -> None:
    """A row counts for a question only if it is trusted for it; other software's rows are told apart."""
    rows = [row(), row(trusted_for=""), row(trusted_for="time"), row(trusted_for="memory_nonHF")]
    questions, reasons = of_table(rows, "memory")
    assert len(questions) == 1
    assert sum(reasons.values()) == 1


def test_rows_of_one_cell_weigh_as_one() -> None:
    """Nine runs of one workload and one of another: the median is not that of the nine."""
    rows = [row(run_id=f"r{n}", mem_value_bytes="30000000000") for n in range(9)]
    rows.append(row(run_id="other", cell="another", mem_value_bytes="10000000000"))
    found = compare(lambda kind: of_table(rows, kind), "memory")
    assert [round(one.weight, 6) for one in found.compared] == [round(1 / 9, 6)] * 9 + [1.0]
    told = answer(found)
    assert told["overall"]["rows"] == told["overall"]["mapped"] == 10
    assert told["overall"]["cells"] == 2
    assert told["overall"]["p95_abs_error"] > 1


def test_knowing_a_cards_other_workloads_takes_a_common_factor_away() -> None:
    """Where a source measured everything 1.5 times as large, the other workloads' factor mends the one left out."""

    def ask(kind: str) -> tuple[list[Any], Reasons]:
        rows = [
            row(cell=f"c{batch}", run_id=f"r{batch}", micro_batch_size=str(batch), mem_value_bytes=str(size))
            for batch, size in sizes.items()
        ]
        return of_table(rows, kind)

    sizes: dict[int, float] = {1: 1.0, 2: 1.0, 4: 1.0}
    sizes = {one.asked.workload.batch_size: round(1.5 * one.predicted) for one in compare(ask, "memory").compared}
    assert errors(compare(ask, "memory").compared)["median_abs_error"] == pytest.approx(1 / 3, abs=1e-3)
    assert errors(compare(ask, "memory", "same-card").compared)["worst_abs_error"] == pytest.approx(0, abs=1e-6)


def test_the_shipped_pack_can_be_asked() -> None:
    """Every published measurement that may judge memory gives a question with its bytes, and one for time its seconds."""
    measurements = list(published())
    for kind in ("memory", "time"):
        questions = of_pack(measurements, kind)
        assert questions
        assert all(one.measured > 0 and one.completeness in "AB" for one in questions)


def test_full_fine_tuning_is_predicted_as_published() -> None:
    """Mistral-7B, 4 x 4,096 tokens, checkpointed, full in bf16: 72,434,837,504 bytes on an A100 (same file), within 0.1%."""
    full = row(method="full", rank="", target_modules="all", mem_value_bytes="72434837504")
    (one,) = compare(lambda kind: of_table([full], kind), "memory").compared
    assert abs(one.error) < 1e-3


def test_a_weighted_quantile_is_that_of_repeated_values() -> None:
    """A value of weight n counts as n values."""
    assert weighted_quantile([(1.0, 1), (2.0, 3), (3.0, 1)], 0.5) == 2.0
    assert weighted_quantile([(1.0, 5), (2.0, 1)], 0.5) == 1.0
    with pytest.raises(ValueError, match="no values"):
        weighted_quantile([], 0.5)


def test_no_rows_give_no_errors() -> None:
    """A table without a row that may judge is answered, not divided by."""
    told = answer(compare(lambda kind: ([], Reasons()), "memory"))
    assert told["overall"]["rows"] == 0
    assert told["overall"]["median_abs_error"] is None
    assert told["by"] == []


def test_an_error_is_relative_to_what_was_measured() -> None:
    """Twice the measured bytes are an error of 1."""
    (asked,), _ = of_table([row()], "memory")
    assert Compared(asked=asked, predicted=2 * asked.measured).error == 1


def write(path: Path, rows: list[Row], columns: Iterable[str] = COLUMNS) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [*columns], extrasaction="ignore", restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"mem_value_bytes": "abc"}, "mem_value_bytes of fms|"),
        ({"mem_value_bytes": "nan"}, "nan"),
        ({"mem_value_bytes": "-5"}, "-5"),
        ({"time_value": "0"}, "time_value"),
        ({"time_value": "inf"}, "inf"),
    ],
)
def test_a_figure_that_is_none_is_an_error(changes: dict[str, str], told: str, tmp_path: Path) -> None:
    """A table with a figure that is no positive number is refused, with the row, the column and the value."""
    with pytest.raises(BadValue, match=re.escape(told)):
        read_table(write(tmp_path / "table.csv", [row(), row(**changes)]))


def test_a_table_of_another_form_is_an_error(tmp_path: Path) -> None:
    """Columns that are missing are named; a table without rows, another encoding and no file at all are errors too."""
    with pytest.raises(BadValue, match="columns too: quant"):
        read_table(write(tmp_path / "few.csv", [row()], [name for name in COLUMNS if name != "quant"]))
    with pytest.raises(BadValue, match="without rows"):
        read_table(write(tmp_path / "none.csv", []))
    (tmp_path / "empty.csv").touch()
    with pytest.raises(BadValue, match="no table"):
        read_table(tmp_path / "empty.csv")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00\x01" * 50)
    with pytest.raises(BadValue, match="UTF-8"):
        read_table(tmp_path / "binary.csv")
    with pytest.raises(OSError, match="absent"):
        read_table(tmp_path / "absent.csv")


def test_what_the_command_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    """JSON has the figures of the whole and by source, card, method and phase, and lists what is not mapped; errors end in 2."""
    table = write(tmp_path / "table.csv", [row(), row(quant="gptq-int4", run_id="other")])
    monkeypatch.setattr("sys.argv", ["published", "--csv", str(table), "--what", "memory", "--json"])
    assert main() == 0
    answered = json.loads(capsys.readouterr().out)
    assert answered["overall"] | {"rows": 2, "mapped": 1, "cells": 1} == answered["overall"]
    assert answered["overall"]["median_abs_error"] == answered["overall"]["p95_abs_error"] < 0.001
    (each,) = answered["by"]
    assert {name: each[name] for name in ("source", "gpu", "method", "phase")} == {
        "source": "fms-acceleration",
        "gpu": "a100-sxm-80gb",
        "method": "lora",
        "phase": "train",
    }
    assert [line["reason"] for line in answered["not_mapped"]] == ["quant 'gptq-int4' has no counterpart"]
    monkeypatch.setattr("sys.argv", ["published", "--csv", str(tmp_path / "absent.csv"), "--what", "time"])
    assert main() == 2
    assert "absent.csv" in capsys.readouterr().err
