"""What every record of this package demands of its fields."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from typing import Any

from whichlora_estimators.errors import BadValue, UnknownName

_LARGEST = 2**63 - 1
#: Unicode's categories of what is not seen or moves what is: control, format, surrogate, private, line, paragraph.
_UNSEEN = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}


def check_choice(name: str, value: object, allowed: Iterable[str]) -> None:
    """Raise UnknownName unless `value` is one of `allowed`."""
    allowed = tuple(allowed)
    if value not in allowed:
        raise UnknownName(name, str(value), allowed, todo=f"Allowed: {', '.join(allowed)}.")


def check_text(name: str, value: object) -> None:
    """Raise BadValue unless `value` is None or Unicode text that is not empty."""
    if value is not None and (not isinstance(value, str) or not value or not is_unicode(value)):
        raise BadValue(f"{name} must be text that is not empty", value=value, todo="Give None where it is unknown.")


def is_unicode(text: str) -> bool:
    """Say whether `text` can be stored: no half of a surrogate pair, as undecodable bytes leave behind."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def printable(text: str) -> str:
    """Return a text of others with whatever would move a cursor, or not be seen, written as an escape."""
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)


def is_plain(text: str) -> bool:
    """Say whether a text holds no control characters, no marks of direction and no letters that are not seen."""
    return text.isprintable() or not any(unicodedata.category(sign) in _UNSEEN for sign in text)


def check_count(name: str, value: object, *, least: int = 1) -> None:
    """Raise BadValue unless `value` is None or a whole number, at least `least`, of 63 bits."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= _LARGEST:
        todo = "Give None where it is unknown, never 0."
        raise BadValue(f"{name} must be a whole number of {least} or more", value=value, todo=todo)


def seconds(name: str, value: object) -> float | None:
    """Return a duration as float. Raises BadValue unless it is positive and finite, or None."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise BadValue(f"{name} must be a positive time", value=value, todo="Give None where it is unknown, never 0.")
    return float(value)


def utc(name: str, value: object) -> datetime:
    """Return a moment in UTC. Raises BadValue for one that does not say its time zone."""
    if not isinstance(value, datetime) or value.utcoffset() is None:
        raise BadValue(f"{name} must be a time with its zone", value=value, todo="Give datetime.now(timezone.utc).")
    try:
        return value.astimezone(timezone.utc)
    except OverflowError:
        raise BadValue(f"{name} is outside the calendar", value=value, todo="Give a year of 1 to 9999.") from None


def utc_text(moment: datetime) -> str:
    """Return `2026-03-01T12:00:00.000000Z`."""
    return moment.astimezone(timezone.utc).isoformat(timespec="microseconds").replace("+00:00", "Z")


def parse_utc(name: str, text: object) -> datetime:
    """Read what `utc_text` writes, or any ISO 8601 time with its zone. Raises BadValue."""
    try:
        moment = datetime.fromisoformat(text.replace("Z", "+00:00")) if isinstance(text, str) else None
    except ValueError:
        moment = None
    if moment is None:
        raise BadValue(f"{name} is not a time", value=text, todo="Write 2026-03-01T12:00:00Z.")
    return utc(name, moment)


def check_object(kind: str, fields: object) -> Mapping[str, Any]:
    """Return `fields` if it maps text. Raises BadValue."""
    if not isinstance(fields, Mapping) or not all(isinstance(key, str) for key in fields):
        raise BadValue(f"{kind} must be an object", value=fields, todo="Give names with values.")
    return fields


def sorted_mapping(name: str, value: object) -> dict[str, Any]:
    """Return a mapping with its keys in order. Raises BadValue unless the keys are names."""
    fields = check_object(name, value)
    for key in fields:
        check_text(f"key of {name}", key)
    return {key: fields[key] for key in sorted(fields)}


def known_keys(kind: str, fields: object, known: Iterable[str]) -> Mapping[str, Any]:
    """Return `fields` if it is an object with no key outside `known`. Raises BadValue or UnknownName."""
    known = tuple(known)
    for key in check_object(kind, fields):
        if key not in known:
            raise UnknownName(f"field of {kind}", key, known, todo=f"Fields: {', '.join(known)}.")
    return check_object(kind, fields)
