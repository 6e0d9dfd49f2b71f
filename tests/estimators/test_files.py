"""Files that are written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from whichlora_estimators.files import write_whole


def test_files_are_replaced_together_or_not_at_all(tmp_path: Path) -> None:
    """Where one cannot be written, all stay as they were and nothing is left beside them."""
    first, second = tmp_path / "first", tmp_path / "second"
    write_whole({first: "a\n", second: "b\n"})
    assert (first.read_text(), second.read_text()) == ("a\n", "b\n")
    with pytest.raises(OSError, match="No such file"):
        write_whole({first: "c", tmp_path / "absent" / "third": "d"})
    assert first.read_text() == "a\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "second"]


def test_a_text_is_written_as_it_is(tmp_path: Path) -> None:
    """UTF-8, and no line end is translated."""
    write_whole({tmp_path / "text": "Größe\r\n\n"})
    assert (tmp_path / "text").read_bytes() == "Größe\r\n\n".encode()
