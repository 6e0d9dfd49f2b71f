"""What a config's `dataset` section says: where the rows are, which to train on, and how they are written out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from whichlora_estimators.errors import BadValue, UnknownName

from .formats import FORMATS

#: Keys of the `dataset` section, besides `samples`.
KEYS = (
    "source",
    "subset",
    "train",
    "validation",
    "test",
    "validation_share",
    "test_share",
    "format",
    "columns",
    "completion_only",
    "packing",
    "group_by_length",
    "seed",
)
_TEXTS = ("source", "subset", "train", "validation", "test")
_FLAGS = ("completion_only", "packing", "group_by_length")
_SHARES = ("validation_share", "test_share")
#: Columns that rows are made of, by our names for them.
COLUMNS = ("text", "messages", "prompt", "completion", "question", "context", "answer")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSpec:
    """A data set and how it is used.

    `source` is a file, an id of the Hugging Face Hub (with its `subset`), or the dotted path of a BaseDataset. `train`,
    `validation` and `test` name splits of the Hub's; the latter two may be files of their own. Where they are not given, the
    shares are taken out of the rows to train on, shuffled by `seed`. `samples` keeps the first so many of these.
    `columns` maps our names of columns to the data's. `packing` joins samples end to end into full sequences;
    `group_by_length` puts samples of like lengths into a batch.
    """

    source: str
    subset: str | None = None
    train: str = "train"
    validation: str | None = None
    test: str | None = None
    validation_share: float = 0.05
    test_share: float = 0.0
    format: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    completion_only: bool = True
    packing: bool = False
    group_by_length: bool = False
    seed: int = 0
    samples: int | None = None

    @property
    def is_class(self) -> bool:
        """Whether the source is the dotted path of a BaseDataset."""
        return ":" in self.source and "://" not in self.source

    @property
    def collation(self) -> str:
        """How samples become batches, by the names of `whichlora_estimators.lengths`."""
        return "pack" if self.packing else "group" if self.group_by_length else "pad"

    def located(self, folder: Path | None = None) -> DataSpec:
        """Return the same with paths to local files made absolute, from `folder` (default: the current one) on.

        So a plan holds for whoever reads it elsewhere on the machine.
        """
        base = folder or Path.cwd()
        return replace(
            self,
            source=_located(self.source, base),
            validation=self.validation and _located(self.validation, base),
            test=self.test and _located(self.test, base),
        )


def _located(value: str, base: Path) -> str:
    path, colon, name = value.partition(":") if ".py:" in value else (value, "", "")
    file = base / Path(path).expanduser()
    return f"{file.resolve()}{colon}{name}" if file.is_file() else value


def data_from_fields(fields: Mapping[str, Any], *, samples: int | None = None) -> DataSpec | None:
    """Validate a `dataset` section; None where it names no source. Raises BadValue or UnknownName for what is not allowed."""
    given = {key: fields[key] for key in KEYS if fields.get(key) is not None}
    if "source" not in given:
        if given:
            todo = "Add `source`: a file, an id of the Hugging Face Hub, or package.module:Class."
            raise BadValue("dataset without a source", value=sorted(given), todo=todo)
        return None
    for key, value in given.items():
        _check(key, value)
    if given.get("format") == "chat" and "text" in given.get("columns", {}):
        raise BadValue("plain text has no chat format", value=given["columns"], todo="Use format: text.")
    if given.get("packing") and given.get("group_by_length"):
        todo = "Leave out group_by_length: packed sequences are all as long."
        raise BadValue("packed samples have no lengths to group by", todo=todo)
    return DataSpec(**given, samples=samples)


def _check(key: str, value: Any) -> None:
    name = f"dataset.{key}"
    if key in _TEXTS and (not isinstance(value, str) or not value.strip()):
        raise BadValue(f"{name} must be a text", value=value, todo="Give a name or a path.")
    if key in _FLAGS and not isinstance(value, bool):
        raise BadValue(f"{name} must be true or false", value=value, todo="Give a boolean.")
    if key in _SHARES and (isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1):
        raise BadValue(f"{name} must be at least 0 and below 1", value=value, todo="Typical: 0.05.")
    if key == "seed" and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
        raise BadValue(f"{name} must be a whole number", value=value, todo="Give 0 or more.")
    if key == "format" and value not in FORMATS:
        raise UnknownName("value of dataset.format", str(value), FORMATS, todo=f"Allowed: {', '.join(FORMATS)}.")
    if key == "columns":
        _check_columns(value)


def _check_columns(value: Any) -> None:
    if not isinstance(value, dict) or not all(isinstance(each, str) for each in value.values()):
        todo = "Example: {prompt: instruction, completion: output}."
        raise BadValue("dataset.columns must map our names of columns to yours", value=value, todo=todo)
    for key in value:
        if key not in COLUMNS:
            raise UnknownName("name in dataset.columns", str(key), COLUMNS, todo=f"Ours: {', '.join(COLUMNS)}.")
