"""What `profiles` and `calibrate` are given wrongly: exit code 2, the reason, and nothing written."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.profiles_db.records import FULL, PLAIN
from whichlora.cli import main
from whichlora_profiles_db import open_store

WRONG = {
    "profiles list --since yesterday": "not a date",
    "profiles list --since 999999d": "is not a date",
    "profiles list --until 9999-12-31T23:59:59-14:00": "is not a date",
    "profiles list --limit -1": "limit",
    "profiles list --gpu nope": "nope",
    "profiles list --db text": "text",
    "profiles list --db folder": "folder",
    "profiles show zz": "too short",
    "profiles show ffffffffffff": "ffffffffffff",
    "profiles stats --remote text": "no such folder",
    "profiles stats --remote nowhere": "no such folder",
    "profiles stats --remote s3://": "without a place",
    "profiles stats --remote foo://x": "foo://x",
    "profiles export out.parquet --gpu t4": "no measurement",
    "profiles export text": "there already",
    "profiles export folder --force": "folder",
    "profiles export text/x.parquet": "text",
    "profiles import nowhere.parquet": "no such pack",
    "profiles import folder": "no file",
    "profiles check text": "no Parquet file",
    "profiles push text/x": "text",
    "profiles push foo://x": "foo://x",
    "profiles pull nowhere": "no such folder",
    "profiles pull text": "no such folder",
    "profiles sync text": "no folder",
    "profiles merge nowhere": "no such store",
    "profiles merge text": "text",
    "profiles merge store.duckdb": "itself",
    "calibrate --coverage 2": "coverage",
    "calibrate --coverage nan": "coverage",
    "calibrate --no-published --db nowhere.duckdb": "no measurements",
    "calibrate --no-published --db text": "text",
    "calibrate --gpu l4": "--suggest",
    "calibrate --suggest 1 --gpu nope": "nope",
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder that commands run in, with a store, a text and a folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WHICHLORA_DB", str(tmp_path / "store.duckdb"))
    monkeypatch.setattr("click.get_app_dir", lambda _: str(tmp_path / "app"))
    open_store(tmp_path / "store.duckdb").add([FULL, PLAIN])
    (tmp_path / "text").write_text("hello", encoding="utf-8")
    (tmp_path / "folder").mkdir()
    return tmp_path


@pytest.mark.parametrize("line", WRONG)
def test_what_is_wrong_is_said_and_nothing_is_written(place: Path, line: str) -> None:
    """The exit code is 2, the message names what is wrong, and every file is as it was; a push notes what it meant to."""
    before = contents(place)
    done = CliRunner().invoke(main, line.split())
    assert done.exit_code == 2, done.output
    assert done.exception is None or isinstance(done.exception, SystemExit)
    assert WRONG[line] in done.output
    if not line.startswith("profiles push"):
        assert contents(place) == before


def contents(place: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(place)): path.read_bytes() if path.is_file() else None for path in place.rglob("*")}
