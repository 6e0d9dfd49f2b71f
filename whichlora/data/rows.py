"""From a source to rows: files of the usual kinds, the Hugging Face Hub, or a class of the user's."""

from __future__ import annotations

import csv
import importlib
import importlib.util
import json
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from whichlora_estimators.errors import BadValue, UnknownName, WhichloraError

from .base import BaseDataset, Row
from .spec import DataSpec

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True, slots=True, kw_only=True)
class Subsets(Generic[T]):
    """What to train on, to validate on while training, and to test the tuned model on."""

    train: tuple[T, ...]
    validation: tuple[T, ...] = ()
    test: tuple[T, ...] = ()

    def map(self, change: Callable[[T], U]) -> Subsets[U]:
        """Change every member."""
        return Subsets(
            train=tuple(map(change, self.train)),
            validation=tuple(map(change, self.validation)),
            test=tuple(map(change, self.test)),
        )


def load_rows(spec: DataSpec, *, offline: bool = False) -> Subsets[Row]:
    """Read a data set and part it. Raises WhichloraError for what cannot be read, and where nothing is left to train on."""
    if spec.is_class:
        train, validation = dataset_object(spec).subsets()
        found = Subsets(train=tuple(train), validation=tuple(validation))
    elif Path(spec.source).suffix.lower() in READERS:
        found = Subsets(train=read_file(Path(spec.source)))
    else:
        found = _hub(spec, offline=offline)
    found = _with_files(spec, found)
    parted = _parted(spec, found)
    if not parted.train:
        raise BadValue("nothing to train on", value=spec.source, todo="Check the file, or take smaller shares of it.")
    return parted


def _with_files(spec: DataSpec, found: Subsets[Row]) -> Subsets[Row]:
    """Put files of their own, where the spec names some, in the place of validation and test rows."""
    files = {name: Path(value) for name in ("validation", "test") if (value := getattr(spec, name))}
    read = {name: read_file(path) for name, path in files.items() if path.suffix.lower() in READERS}
    return replace(found, **read)


def _parted(spec: DataSpec, found: Subsets[Row]) -> Subsets[Row]:
    """Take validation and test rows out of those to train on, where there are none; then keep so many as asked."""
    rows = list(found.train)
    shares = {
        "test": spec.test_share if not found.test else 0.0,
        "validation": spec.validation_share if not (found.validation or spec.is_class) else 0.0,
    }
    if any(shares.values()):
        random.Random(spec.seed).shuffle(rows)
    parts: dict[str, tuple[Row, ...]] = {}
    for name, share in shares.items():
        count = min(len(rows) - 1, max(1, round(share * len(found.train)))) if share and len(rows) > 1 else 0
        parts[name], rows = tuple(rows[:count]), rows[count:]
    return Subsets(
        train=tuple(rows[: spec.samples]),
        validation=parts["validation"] or found.validation,
        test=parts["test"] or found.test,
    )


# --- files ---


def read_file(path: Path) -> tuple[Row, ...]:
    """Read the rows of a file by its suffix. Raises BadValue with the line where one is malformed."""
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise UnknownName("kind of data file", path.suffix, READERS, todo=f"Known: {', '.join(READERS)}.")
    try:
        rows = tuple(reader(path))
    except OSError as error:
        raise BadValue("cannot read the data set", value=str(path), todo=f"{error.strerror or error}.") from None
    except UnicodeDecodeError:
        raise BadValue("the data set is not UTF-8 text", value=str(path), todo="Convert it first.") from None
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise BadValue(f"row {number} of {path} is not an object", value=str(row)[:80], todo="Give named columns.")
    return rows


def _json_lines(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise BadValue(f"line {number} of {path} is not JSON", value=line[:80], todo=f"{error}.") from None


def _json(path: Path) -> Iterator[Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError:
        yield from _json_lines(path)  # many files called .json hold lines
        return
    if not isinstance(content, list):
        todo = "Give a list of objects, or one object a line in a .jsonl file."
        raise BadValue("the JSON file holds no list of rows", value=str(path), todo=todo)
    yield from content


def _csv(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        for row in csv.DictReader(lines, delimiter="\t" if path.suffix.lower() == ".tsv" else ","):
            yield {key: value for key, value in row.items() if key is not None}


def _columnar(path: Path) -> Iterator[Any]:
    """Read Parquet, Feather and Arrow (a stream, as the library datasets writes, or a file)."""
    arrow = _library("pyarrow")
    try:
        if path.suffix.lower() == ".parquet":
            return iter(importlib.import_module("pyarrow.parquet").read_table(path).to_pylist())
        try:
            return iter(arrow.ipc.open_file(path).read_all().to_pylist())
        except arrow.ArrowInvalid:
            return iter(arrow.ipc.open_stream(path).read_all().to_pylist())
    except arrow.ArrowInvalid as error:
        raise BadValue("not a file of this kind", value=str(path), todo=f"{str(error)[:200]}") from None


READERS: dict[str, Callable[[Path], Iterator[Any]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _columnar,
    ".arrow": _columnar,
    ".feather": _columnar,
}


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        todo = 'Install it: pip install "whichlora[gpu]"; JSON lines and CSV need nothing.'
        raise WhichloraError(
            "reading this data set needs a library that is not installed", value=name, todo=todo
        ) from None


# --- the Hub ---


def _hub(spec: DataSpec, *, offline: bool) -> Subsets[Row]:
    """Load splits of the Hub's; of what is cached of it, where it cannot be asked or may not be."""
    datasets = _library("datasets")
    try:
        splits = _cached_splits(datasets, spec) if offline else datasets.load_dataset(spec.source, spec.subset)
    except Exception as error:  # the library raises a dozen kinds, most of them its own
        splits = None
        if not offline:
            with suppress(Exception):
                splits = _cached_splits(datasets, spec)
        if splits is None:
            raise _not_loaded(spec, error, offline=offline) from error
    wanted = {"train": spec.train, "validation": spec.validation or "validation", "test": spec.test or "test"}
    asked = {"train", *(name for name in ("validation", "test") if _is_split(getattr(spec, name)))}
    for name in asked:
        if wanted[name] not in splits:
            raise UnknownName(f"{name} split", wanted[name], splits, todo=f"It has: {', '.join(splits)}.")
    rows = {name: tuple(splits[split]) for name, split in wanted.items() if split in splits}
    return Subsets(**rows)


def _cached_splits(datasets: Any, spec: DataSpec) -> Any:
    """Load from the caches of the Hub and of the library alone; both read the environment only when they are imported."""
    hub: Any = importlib.import_module("huggingface_hub.constants")
    before = hub.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    hub.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        return datasets.load_dataset(spec.source, spec.subset)
    except Exception:  # the library wants a README there, which not every download has, and hides what else is wrong
        folder = ""
        with suppress(Exception):
            whole = importlib.import_module("huggingface_hub").snapshot_download
            folder = whole(spec.source, repo_type="dataset", local_files_only=True)
        if not folder:
            raise
        return datasets.load_dataset(folder, spec.subset)
    finally:
        hub.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def _not_loaded(spec: DataSpec, error: Exception, *, offline: bool) -> WhichloraError:
    said = " ".join(str(error).split())[:300]
    asked = (
        "It is in no cache here: leave out --offline to ask the Hub" if offline else "Check the name and the network"
    )
    todo = f"{asked}; for a gated one log in with `hf auth login`. Or give a file ({', '.join(READERS)}). {said}"
    return WhichloraError("cannot load the data set", value=spec.source, todo=todo)


def _is_split(value: str | None) -> bool:
    return bool(value) and Path(str(value)).suffix.lower() not in READERS


# --- a class ---


def dataset_object(spec: DataSpec) -> BaseDataset:
    """Import the class that the source names and make one. Raises BadValue where there is none, or where it is none."""
    where, _, name = spec.source.rpartition(":")
    try:
        module = _module(where)
    except Exception as error:  # a user's module raises what it likes
        what = f"{type(error).__name__}: {error}"[:200]
        todo = f"{what}. Give package.module:Class, importable from here, or path/to/file.py:Class."
        raise BadValue("cannot import the data set's module", value=where, todo=todo) from error
    kind = getattr(module, name, None)
    if not isinstance(kind, type) or not issubclass(kind, BaseDataset):
        todo = "Derive it from whichlora.data.BaseDataset, with its methods subsets and to_text."
        raise BadValue("not a BaseDataset", value=spec.source, todo=todo)
    if kind.__abstractmethods__:
        lacks = ", ".join(sorted(kind.__abstractmethods__))
        raise BadValue("the data set lacks methods", value=spec.source, todo=f"Write {lacks}.")
    made: BaseDataset = kind()
    return made


def _module(where: str) -> Any:
    """Import by dotted name, from the current folder too, or by the path of a file."""
    if where.endswith(".py"):
        name = f"whichlora_dataset_{Path(where).stem}"
        spec = importlib.util.spec_from_file_location(name, where)
        assert spec
        assert spec.loader
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        return module
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        return importlib.import_module(where)
    finally:
        sys.path.remove(here)


def first_keys(rows: Sequence[Row]) -> str:
    """Name the columns of the first row, for messages."""
    return ", ".join(map(str, rows[0])) if rows else "none"
