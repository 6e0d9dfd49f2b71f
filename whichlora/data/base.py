"""A data set in code: a class with two methods, named in a config by its dotted path."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

#: A row as it was read: names of columns and their values.
Row = Mapping[str, Any]


class BaseDataset(ABC):
    """What a data set of one's own derives from; it is made without arguments.

    A config names it as `package.module:Class`, or as `path/to/file.py:Class`.
    """

    @abstractmethod
    def subsets(self) -> tuple[Sequence[Row], Sequence[Row]]:
        """Return the rows to train on and the rows to validate on."""

    @abstractmethod
    def to_text(self, row: Row) -> str | tuple[str, str]:
        """Return a row's text; or its prompt and its completion, which alone is then trained on."""
