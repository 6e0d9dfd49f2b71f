"""What can be wrong with a store; every one is a WhichloraError."""

from __future__ import annotations

from pathlib import Path

from whichlora_estimators.errors import WhichloraError


class StoreError(WhichloraError):
    """A store that cannot be read or written."""


class StoreBusy(StoreError):
    """Somebody else held the file for longer than we may wait."""

    def __init__(self, path: Path, *, waited_s: float, holder: str) -> None:
        todo = f"Waited {waited_s:.1f} s; let {holder} finish or close the file, then try again."
        super().__init__("another process is using the store", value=str(path), todo=todo)


class NotAStore(StoreError):
    """A file that is damaged or is something else; it was left as it is."""

    def __init__(self, path: Path, *, why: str) -> None:
        todo = "The file was left untouched: name another one with --db or WHICHLORA_DB, or restore it from a copy."
        super().__init__(f"not a store that can be read ({why})", value=str(path), todo=todo)


class StoreTooNew(StoreError):
    """A store whose schema a newer whichlora wrote."""

    def __init__(self, path: Path, *, found: int, known: int) -> None:
        todo = f"It has schema {found} and this version knows up to {known}: upgrade whichlora."
        super().__init__("the store was written by a newer whichlora", value=str(path), todo=todo)


class UnknownMeasurement(StoreError):
    """An id that names no measurement of the store, or several."""


class BadPack(StoreError):
    """A pack that is damaged, is something else, or holds what cannot be; nothing of it was taken."""
