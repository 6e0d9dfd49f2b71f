"""Frozen records to plain JSON and back: every field is there, no other is, and each has the type that it declares."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from whichlora_estimators.errors import BadValue

T = TypeVar("T")

#: How records that need more than their fields' types are written and read; the reader is told where the value stands.
Writers = Mapping[type, Callable[[Any], Any]]
Readers = Mapping[type, Callable[[Any, str], Any]]


def to_json(value: Any, writers: Writers | None = None) -> Any:
    """Turn records, mappings and tuples into dicts and lists, recursively; `writers` handle their types themselves."""
    if writers and type(value) in writers:
        return writers[type(value)](value)
    if dataclasses.is_dataclass(value):
        return {field.name: to_json(getattr(value, field.name), writers) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: to_json(each, writers) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(each, writers) for each in value]
    return value


def from_json(kind: type[T], value: Any, where: str, readers: Readers | None = None) -> T:
    """Read a record of this kind. Raises BadValue that names the place for what is missing, unknown or of another type.

    Numbers must be finite and not negative: our records hold bytes, seconds, counts and rates.
    """
    record: T = _read(kind, value, where, readers or {})
    return record


def _read(kind: Any, value: Any, where: str, readers: Readers) -> Any:
    if kind is Any:
        return value
    if kind in readers:
        return readers[kind](value, where)
    if dataclasses.is_dataclass(kind):
        return _read_fields(kind, value, where, readers)
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return _read_union(inner, value, where, readers)
    if origin is tuple:
        return _read_tuple(inner, value, where, readers)
    if origin is not None:
        _expect(isinstance(value, dict), value, where, "an object")
        return {key: _read(inner[1], each, f"{where}.{key}", readers) for key, each in value.items()}
    return _read_plain(kind, value, where)


def _read_union(inner: tuple[Any, ...], value: Any, where: str, readers: Readers) -> Any:
    if value is None and NoneType in inner:
        return None
    kinds = [kind for kind in inner if kind is not NoneType]
    for kind in kinds[:-1]:
        try:
            return _read(kind, value, where, readers)
        except BadValue:
            continue
    return _read(kinds[-1], value, where, readers)


def _read_fields(kind: Any, value: Any, where: str, readers: Readers) -> Any:
    _expect(isinstance(value, dict), value, where, "an object")
    hints = get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    for name in names:
        if name not in value:
            raise BadValue(f"{_path(where, name)} is missing", todo=f"Fields there: {', '.join(names)}.")
    for name in value:
        if name not in names:
            raise BadValue(f"{_path(where, name)} is not known", todo=f"Fields there: {', '.join(names)}.")
    return kind(**{name: _read(hints[name], value[name], _path(where, name), readers) for name in names})


def _read_tuple(inner: tuple[Any, ...], value: Any, where: str, readers: Readers) -> tuple[Any, ...]:
    _expect(isinstance(value, list), value, where, "a list")
    kinds = inner[:1] * len(value) if inner[1:] == (...,) else inner
    _expect(len(value) == len(kinds), value, where, f"a list of {len(kinds)}")
    pairs = enumerate(zip(kinds, value, strict=True))
    return tuple(_read(kind, each, f"{where}[{index}]", readers) for index, (kind, each) in pairs)


def _read_plain(kind: type, value: Any, where: str) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    _expect(type(value) is kind, value, where, {str: "a text", bool: "true or false"}.get(kind, "a number"))
    if kind in (int, float):
        _expect(math.isfinite(value) and value >= 0, value, where, "a number of 0 or more")
    return value


def _expect(holds: bool, value: Any, where: str, wanted: str) -> None:
    if not holds:
        shown = value if isinstance(value, str | int | float | bool) else type(value).__name__
        raise BadValue(
            f"{where or 'the document'} must be {wanted}", value=shown, todo="Mend it, or make the file anew."
        )


def _path(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name
