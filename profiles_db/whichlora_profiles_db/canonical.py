"""One text for one content: canonical JSON, and the SHA-256 that names it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

from whichlora_estimators.errors import BadValue

from .checks import is_unicode


def canonical_json(content: object) -> str:
    """Return JSON that depends on the content alone: keys sorted, no spaces, `500000.0` written as `500000`.

    Raises BadValue for what JSON cannot hold: NaN and infinities, keys that are not text, text that is not Unicode.
    """
    text = json.dumps(_plain(content), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    if not is_unicode(text):
        raise BadValue("text that is not valid Unicode", todo="Replace what could not be decoded.")
    return text


def content_hash(content: object) -> str:
    """Return the SHA-256 of the canonical JSON of `content`, as 64 hexadecimal digits."""
    return text_hash(canonical_json(content))


def text_hash(text: str) -> str:
    """Return the SHA-256 of a text in UTF-8, as 64 hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(value: object) -> Any:
    """Rebuild `value` of JSON's types only; whole floats become int, so that equal numbers are equal text."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise BadValue("not a number that JSON can hold", value=value, todo="Leave out what is unknown.")
        return int(value) if value.is_integer() else value
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise BadValue("keys must be text, as in JSON", value=key, todo="Read them from a JSON file.")
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    raise BadValue("not something that JSON can hold", value=value, todo="Give text, numbers, lists and objects.")
