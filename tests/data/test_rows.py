"""From sources to samples: files of every kind, classes, columns and formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whichlora import BadValue, WhichloraError
from whichlora.data import DataSpec, Sample, data_from_fields, load_samples
from whichlora.data.rows import load_rows

ROWS = [{"question": f"How much is {n} and {n}?", "answer": f"{2 * n}, surely", "context": "ä, ü"} for n in range(20)]
DATASET = """
from whichlora.data import BaseDataset

class Sums(BaseDataset):
    def subsets(self):
        rows = [{"n": n} for n in range(10)]
        return rows[:8], rows[8:]

    def to_text(self, row):
        return f"{row['n']} + 1 =", f" {row['n'] + 1}"

class Half(BaseDataset):
    def subsets(self):
        return [], []

class Other:
    pass
"""


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows in the kind of file that the suffix names; `.stream.arrow` is a stream, as datasets writes."""
    import csv

    import pyarrow as pa
    from pyarrow import feather, parquet

    table = pa.Table.from_pylist(rows)
    if path.suffix in (".jsonl", ".ndjson"):
        path.write_text("\n\n".join(map(json.dumps, rows)), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", encoding="utf-8-sig", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        parquet.write_table(table, path)
    elif path.suffix == ".feather":
        feather.write_feather(table, path)
    else:
        make = pa.ipc.new_stream if ".stream" in path.name else pa.ipc.new_file
        with make(path, table.schema) as writer:
            writer.write_table(table)
    return path


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.ndjson", "a.json", "a.csv", "a.tsv", "a.parquet", "a.feather", "a.arrow", "a.stream.arrow"]
)
def test_a_file_of_any_kind_holds_the_same_rows(name: str, tmp_path: Path) -> None:
    """What was written is read, in its order, whatever the kind of file."""
    path = write(tmp_path / name, ROWS)
    assert list(load_rows(DataSpec(source=str(path), validation_share=0.0)).train) == ROWS


@given(st.integers(1, 40), st.floats(0, 0.9), st.floats(0, 0.9), st.integers(0, 5))
def test_parts_are_disjoint_and_make_up_the_whole(
    tmp_path_factory: pytest.TempPathFactory, count: int, validation: float, test: float, seed: int
) -> None:
    """Every row is in one part, the same one each time; something is always left to train on."""
    path = tmp_path_factory.getbasetemp() / "parts.jsonl"
    path.write_text("\n".join(json.dumps({"text": str(n)}) for n in range(count)), encoding="utf-8")
    spec = DataSpec(source=str(path), validation_share=validation, test_share=test, seed=seed)
    parts = load_rows(spec)
    everything = [row["text"] for part in (parts.train, parts.validation, parts.test) for row in part]
    assert sorted(everything) == sorted(map(str, range(count)))
    assert parts.train
    assert load_rows(spec) == parts


def test_a_class_is_found_by_dotted_path_and_by_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways give the class's own parts and texts; what is none, or lacks a method, is refused with its name."""
    (tmp_path / "own_sums.py").write_text(DATASET, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for source in ("own_sums:Sums", str(tmp_path / "own_sums.py:Sums")):
        samples = load_samples(DataSpec(source=source))
        assert samples.train == tuple(Sample(prompt=f"{n} + 1 =", completion=f" {n + 1}") for n in range(8))
        assert len(samples.validation) == 2
    for source, reason in (("own_sums:Half", "lacks"), ("own_sums:Other", "BaseDataset"), ("nowhere:X", "import")):
        with pytest.raises(BadValue, match=reason):
            load_samples(DataSpec(source=source))


CONFIGS: dict[str, dict[str, Any]] = {
    "gemma": {"model_type": "gemma2", "vocab_size": 256000},
    "llama2": {"model_type": "llama", "vocab_size": 32000},
    "llama3": {"model_type": "llama", "vocab_size": 128256},
    "mistral": {"model_type": "mistral", "vocab_size": 32000},
    "plain": {"model_type": "gpt2", "vocab_size": 50257},
}
ASKED = "Context: C\nQuestion: Q\nAnswer:"
WRITTEN = {
    "gemma": (f"<start_of_turn>user\n{ASKED}<end_of_turn>\n<start_of_turn>model\n", "A<end_of_turn>"),
    "llama2": (f"[INST] {ASKED} [/INST]", " A"),
    "llama3": (
        f"<|start_header_id|>user<|end_header_id|>\n\n{ASKED}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "A<|eot_id|>",
    ),
    "mistral": (f"[INST] {ASKED} [/INST]", " A"),
    "plain": (f"{ASKED}\n", "A"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_questions_are_written_as_the_family_was_tuned_on(name: str, tmp_path: Path) -> None:
    """Golden: the prompt formats that each family's documentation shows (formats.py names the pages)."""
    answers: list[Any] = ["A", ["A", "B"], {"text": ["A"], "answer_start": [0]}]
    path = tmp_path / "q.jsonl"
    rows = [{"question": "Q", "context": "C", "answer": answer} for answer in answers]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    samples = load_samples(DataSpec(source=str(path), validation_share=0.0), config=CONFIGS[name])
    prompt, completion = WRITTEN[name]
    assert set(samples.train) == {Sample(prompt=prompt, completion=completion)}
    by_name = load_samples(DataSpec(source=str(path), validation_share=0.0, format=name))
    assert by_name.train == samples.train


@pytest.mark.parametrize("name", ["gemma", "llama2", "llama3", "mistral"])
def test_a_conversation_ends_with_what_is_learnt(name: str, tmp_path: Path) -> None:
    """All turns are in the prompt in their order, a system text before the first, and the last answer alone is learnt."""
    turns = [("system", "SYS"), ("user", "U1"), ("assistant", "A1"), ("human", "U2"), ("gpt", "A2"), ("user", "U3")]
    row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    path = tmp_path / "m.jsonl"
    path.write_text(json.dumps(row), encoding="utf-8")
    (sample,) = load_samples(DataSpec(source=str(path), format=name)).train
    places = [sample.prompt.index(text) for text in ("SYS", "U1", "A1", "U2")]
    assert places == sorted(places)
    assert "A2" in sample.completion
    assert "A2" not in sample.prompt
    assert "U3" not in sample.text


@pytest.mark.parametrize(
    ("row", "columns", "expected"),
    [
        ({"text": "T"}, {}, Sample(prompt="", completion="T")),
        ({"body": "T", "text": "no"}, {"text": "body"}, Sample(prompt="", completion="T")),
        ({"prompt": "P", "completion": "C"}, {}, Sample(prompt="P\n", completion="C")),
        ({"instruction": "P", "input": "I", "output": "C"}, {}, Sample(prompt="P\n\nI\n", completion="C")),
        (
            {"ask": "P", "say": "C", "text": "no"},
            {"prompt": "ask", "completion": "say"},
            Sample(prompt="P\n", completion="C"),
        ),
    ],
)
def test_columns_are_recognised_or_mapped(
    row: dict[str, str], columns: dict[str, str], expected: Sample, tmp_path: Path
) -> None:
    """The usual names are known, and a mapping goes before them."""
    path = tmp_path / "c.jsonl"
    path.write_text(json.dumps(row), encoding="utf-8")
    assert load_samples(DataSpec(source=str(path), columns=columns)).train == (expected,)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "nothing to train on"),
        ("{", "line 1"),
        ("[1]", "not an object"),
        ('{"a": 1}', "The rows have: a"),
        ('{"text": 1}', "not text"),
        ('{"messages": [{"role": "cat", "content": "x"}]}', "cat"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "without an answer"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(text: str, reason: str, tmp_path: Path) -> None:
    """The message names the place."""
    path = tmp_path / "bad.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(WhichloraError, match=reason):
        load_samples(DataSpec(source=str(path)))


@pytest.mark.parametrize(
    "fields",
    [
        {"source": ""},
        {"source": "x", "packing": 1},
        {"source": "x", "validation_share": 1},
        {"source": "x", "format": "chatty"},
        {"source": "x", "columns": {"txt": "t"}},
        {"source": "x", "seed": -1},
        {"format": "text"},
    ],
)
def test_a_section_that_cannot_be_is_refused(fields: dict[str, Any]) -> None:
    """Values out of range, names that are not known, and settings of no source."""
    with pytest.raises(WhichloraError):
        data_from_fields(fields)
