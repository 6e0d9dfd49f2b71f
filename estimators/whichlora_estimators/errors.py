"""The one family of errors that users see: what is wrong, its value, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class WhichloraError(Exception):
    """Something that the user can mend. Every message says what is wrong, with which value, and what to do."""

    def __init__(self, what: str, *, value: object = None, todo: str) -> None:
        self.what = what
        self.value = value
        self.todo = todo
        super().__init__(what, value, todo)

    def __str__(self) -> str:
        shown = "" if self.value is None else f": {self.value!r}"
        return f"{self.what}{shown}. {self.todo}"


class BadValue(WhichloraError):
    """A value outside what its field allows."""


class UnknownName(WhichloraError):
    """A name that is in none of our registries; `nearest` holds the names that look most like it."""

    def __init__(self, kind: str, name: str, known: Iterable[str], *, todo: str = "") -> None:
        self.nearest = nearest(name, known)
        hint = f"Nearest known: {', '.join(self.nearest)}." if self.nearest else "Nothing known looks like it."
        super().__init__(f"unknown {kind}", value=name, todo=f"{hint} {todo}".strip())


class Unsupported(WhichloraError):
    """A configuration that is understood but not modelled: refused, never guessed."""


def nearest(name: str, known: Iterable[str], *, limit: int = 3) -> list[str]:
    """Return up to `limit` known names that look like `name`, best first, ignoring case."""
    by_lower = {candidate.lower(): candidate for candidate in known}
    found = difflib.get_close_matches(name.lower(), by_lower, n=limit, cutoff=0.4)
    return [by_lower[candidate] for candidate in found]
