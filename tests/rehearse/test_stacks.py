"""Rehearsals under other versions, and of models that are loaded."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest

from whichlora.nulldevice.compiler import cache_folder
from whichlora.rehearse import make_stack, rehearse
from whichlora.rehearse.stacks import parse_stack
from whichlora_estimators.errors import BadValue, WhichloraError

from .conftest import tiny

pytestmark = pytest.mark.stack

OLDER = "peft==0.18.1"


@pytest.mark.parametrize(
    ("text", "requirements"),
    [
        ("transformers==5.8.1,torch==2.6.0", ("torch==2.6.0", "transformers==5.8.1")),
        ("transformers>=4.45,<5, peft", ("peft", "transformers>=4.45,<5")),
        ("bitsandbytes == 0.45.0", ("bitsandbytes==0.45.0",)),
    ],
)
def test_requirements_are_read(text: str, requirements: tuple[str, ...]) -> None:
    """Requirements stand between commas, in any order and spacing."""
    assert parse_stack(text) == requirements


@pytest.mark.parametrize("text", ["", "torch=2.6", "torch==2.6,torch==2.7", "--index-url x", "a;b"])
def test_what_is_no_requirement_is_refused(text: str) -> None:
    """Nothing that is no list of requirements reaches pip."""
    with pytest.raises(BadValue):
        parse_stack(text)


def test_what_a_killed_process_left_half_made_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment without its last file is none: it is made whole in the same place, and then nothing more is done."""
    monkeypatch.setenv("WHICHLORA_CACHE_DIR", str(tmp_path))
    here = metadata.version("torch")
    same = f"torch=={here.partition('+')[0]}"  # what is here already: nothing is downloaded
    program = f"from whichlora.rehearse import make_stack; make_stack({same!r})"
    with subprocess.Popen([sys.executable, "-c", program], start_new_session=True) as process:
        while not list(tmp_path.glob("stacks/*/bin/python")):
            assert process.poll() is None
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
    (half,) = (path for path in (tmp_path / "stacks").iterdir() if path.is_dir())
    (half / "left-behind").touch()
    told: list[str] = []
    made = make_stack(same, told.append)
    assert told[0].startswith("making an environment")
    assert made.python.is_relative_to(half)
    assert not (half / "left-behind").exists()
    assert made.versions["torch"] == here
    assert make_stack(same, told.append) == made
    assert len(told) == 1


def test_another_release_runs() -> None:
    """A rehearsal under another PEFT says so in its versions and quantises as here; the environment is made once."""
    try:
        older = make_stack(OLDER)
    except WhichloraError as error:
        pytest.skip(f"pip cannot get it here: {error}"[:200])
    told: list[str] = []
    assert make_stack(OLDER, told.append) == older
    assert told == []
    assert older.python.is_relative_to(cache_folder().parent / "stacks")
    (seen,) = rehearse([tiny(quantization="nf4")], "rtx-4090", stack=older)
    assert seen.outcome == "ok", seen.error
    assert (seen.stack, seen.versions["peft"]) == (OLDER, OLDER.partition("==")[2])
    assert seen.versions["torch"] == metadata.version("torch")
