"""From rows to samples: which columns are what, and in which format they are written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from whichlora_estimators.errors import BadValue

from .base import Row
from .formats import WRITERS, Sample, Turns, format_of, write_chat
from .rows import Subsets, dataset_object, first_keys, load_rows
from .spec import DataSpec

#: Names that widely used data sets give to these columns.
_USUAL: dict[str, tuple[str, ...]] = {
    "messages": ("messages", "conversations"),
    "question": ("question",),
    "context": ("context",),
    "answer": ("answer", "answers"),
    "prompt": ("prompt", "instruction"),
    "completion": ("completion", "output", "response"),
    "text": ("text",),
}
_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}  # as ShareGPT files call them
_ROLE_NAMES = ("system", "user", "assistant")


def load_samples(
    spec: DataSpec, *, config: Mapping[str, Any] | None = None, tokenizer: Any = None, offline: bool = False
) -> Subsets[Sample]:
    """Read a data set and write every row in the format of the spec.

    `config` is that of the model, whose family decides the format `model`; `tokenizer` writes the format `chat`. Without
    one, chats are written in the model's format. Raises WhichloraError for rows that are not understood.
    """
    rows = load_rows(spec, offline=offline)
    if spec.is_class:
        return rows.map(_by_class(spec))
    write = _writer(spec, rows, config or {}, tokenizer)
    return rows.map(write)


def _by_class(spec: DataSpec) -> Callable[[Row], Sample]:
    dataset = dataset_object(spec)

    def write(row: Row) -> Sample:
        text = dataset.to_text(row)
        if isinstance(text, str):
            return Sample(prompt="", completion=text)
        if not (isinstance(text, tuple) and len(text) == 2 and all(isinstance(part, str) for part in text)):
            todo = "Return a text, or a pair of prompt and completion."
            raise BadValue("to_text returned neither", value=str(text)[:80], todo=todo)
        return Sample(prompt=text[0], completion=text[1])

    return write


def _writer(spec: DataSpec, rows: Subsets[Row], config: Mapping[str, Any], tokenizer: Any) -> Callable[[Row], Sample]:
    columns = _columns(spec, rows)
    kind = _format(spec, columns, config, tokenizer)

    def write(row: Row) -> Sample:
        if kind == "text":
            return Sample(prompt="", completion=_text(row, columns["text"]))
        turns = _turns(row, columns)
        return write_chat(turns, tokenizer) if kind == "chat" else WRITERS[kind](turns)

    return write


def _format(spec: DataSpec, columns: Mapping[str, str], config: Mapping[str, Any], tokenizer: Any) -> str:
    """Resolve `auto` and `model`: text as it is, chats by the template, questions as the model's family has them."""
    if "text" in columns:
        return "text"
    kind = spec.format
    if kind == "auto":
        kind = "chat" if "messages" in columns else "model" if "question" in columns else "plain"
        if kind == "chat" and not getattr(tokenizer, "chat_template", None):
            kind = "model"
    if kind == "chat" and tokenizer is None:
        kind = "model"
    if kind == "text":
        raise BadValue("no column of text", value=sorted(columns), todo="Name it: dataset.columns: {text: …}.")
    return format_of(config) if kind == "model" else kind


def _columns(spec: DataSpec, rows: Subsets[Row]) -> dict[str, str]:
    """Find which columns to use: those that the spec maps, or the first usual combination that the rows have."""
    there = set(rows.train[0])
    found = {ours: name for ours, names in _USUAL.items() for name in names if name in there}
    found |= spec.columns
    for ours, name in spec.columns.items():
        if name not in there:
            raise BadValue(f"no column for {ours}", value=name, todo=f"The rows have: {first_keys(rows.train)}.")
    wanted = set(spec.columns) or set(found)
    for needed, optional in (
        (("messages",), ()),
        (("question", "answer"), ("context",)),
        (("prompt", "completion"), ()),
    ):
        if set(needed) <= set(found) and wanted & set(needed):
            return {ours: found[ours] for ours in (*needed, *optional) if ours in found}
    if "text" in found:
        return {"text": found["text"]}
    todo = (
        f"The rows have: {first_keys(rows.train)}. Map them with dataset.columns to text, messages, "
        "prompt and completion, or question, answer (and context)."
    )
    raise BadValue("no columns that are understood", value=spec.source, todo=todo)


def _turns(row: Row, columns: Mapping[str, str]) -> Turns:
    if "messages" in columns:
        return _messages(row, columns["messages"])
    if "question" in columns:
        question = f"Question: {_text(row, columns['question'])}"
        if "context" in columns and row.get(columns["context"]):
            question = f"Context: {_text(row, columns['context'])}\n{question}"
        return Turns(messages=(("user", f"{question}\nAnswer:"), ("assistant", _answer(row, columns["answer"]))))
    prompt = _text(row, columns["prompt"])
    if columns["prompt"] == "instruction" and row.get("input"):  # as Alpaca's rows have it
        prompt = f"{prompt}\n\n{row['input']}"
    return Turns(messages=(("user", prompt), ("assistant", _text(row, columns["completion"]))))


def _messages(row: Row, column: str) -> Turns:
    said = row.get(column)
    if not isinstance(said, list) or not said:
        raise BadValue(f"{column} holds no list of messages", value=str(said)[:80], todo="Give role and content.")
    messages = []
    for each in said:
        given = each if isinstance(each, Mapping) else {}
        role = str(given.get("role", given.get("from", "")))
        role, content = _ROLES.get(role, role), given.get("content", given.get("value"))
        if role not in _ROLE_NAMES or not isinstance(content, str):
            todo = f"Give role ({', '.join(_ROLE_NAMES)}) and content."
            raise BadValue(f"a message in {column} is not understood", value=str(each)[:80], todo=todo)
        messages.append((role, content))
    while messages and messages[-1][0] != "assistant":
        messages.pop()  # what nobody answered teaches nothing
    if not messages:
        raise BadValue("a conversation without an answer", value=str(said)[:80], todo="Take it out.")
    return Turns(messages=tuple(messages))


def _answer(row: Row, column: str) -> str:
    """Return an answer; the first one where there are several, as in SQuAD."""
    value = row.get(column)
    if isinstance(value, Mapping):
        value = value.get("text")
    if isinstance(value, list):
        value = value[0] if value else ""
    return _as_text(value, column)


def _text(row: Row, column: str) -> str:
    return _as_text(row.get(column), column)


def _as_text(value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise BadValue(f"column {column} holds something that is not text", value=str(value)[:80], todo="Mend the row.")
    return value
