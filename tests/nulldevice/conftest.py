"""A card that is not there, and programs that run on it in a process of their own."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from whichlora_estimators.gpus import Gpu, all_gpus

from ..stack import needs, own_store

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("WHICHLORA_TEST_PYTHON", sys.executable))  # whose PyTorch the programs run on
_LAST_WORD = "\nimport json as _json; print('\\n' + _json.dumps(result))\n"

_COPIES = """
import json, os, sys, traceback
from pathlib import Path
import torch
folder = Path(sys.argv[1])
for line in sys.stdin:
    asked = json.loads(line)
    (folder / "result").write_text("")
    child = os.fork()
    if not child:
        os.environ.clear()
        os.environ.update(asked["environ"])
        os.dup2(os.open(folder / "stderr", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        os.dup2(2, 1)
        result, status = {}, 1
        try:
            exec(asked["program"], {"__name__": "__main__", "result": result})
            (folder / "result").write_text(json.dumps(result))
            status = 0
        except BaseException:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """What a program left: its `result` (a dict that it filled), its exit code, and what it said."""

    result: dict[str, Any]
    exit_code: int
    stderr: str


def card(capability: str = "8.0", *, gib: float = 80) -> Gpu:
    """Return a made-up card of a compute capability and a size."""
    major, minor = capability.split(".")
    return dataclasses.replace(
        all_gpus()[0],
        name=f"Null {capability}",
        compute_capability=(int(major), int(minor)),
        sm_count=100,
        total_bytes=int(gib * 2**30),
    )


@pytest.fixture(scope="session", autouse=True)
def _own_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Begin with an empty store, and ask no network."""
    needs("torch")
    with own_store(tmp_path_factory) as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("TRANSFORMERS_VERBOSITY", "error")
        yield


def variables(gpu: Gpu | None = None, *, extra: dict[str, str] | None = None, **options: Any) -> dict[str, str]:
    """Return the environment of a program on a card."""
    from whichlora.nulldevice import environment

    made = {**os.environ, **environment(gpu or card(), python=PYTHON, **options), **(extra or {})}
    folders = [ROOT, *(ROOT / name for name in ("estimators", "profiles_db", "calibration"))]
    made["PYTHONPATH"] = os.pathsep.join([made["PYTHONPATH"], *map(str, folders)])
    return made


@pytest.fixture(scope="session")
def on_null(_own_store: None) -> Callable[..., Ran]:
    """Return a function that runs a program on a card and returns what it left; the program fills the dict `result`."""

    def run(program: str, gpu: Gpu | None = None, **options: Any) -> Ran:
        command = [str(PYTHON), "-c", "result = {}\n" + program + _LAST_WORD]
        environ = variables(gpu, **options)
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=300)
        result = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {}
        return Ran(result=result, exit_code=done.returncode, stderr=done.stderr)

    return run


@pytest.fixture(scope="module")
def on_torch(_own_store: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Ran]]:
    """Return a function like that of `on_null`, whose programs run in copies of a process that has imported PyTorch.

    The device reads its card when CUDA is first used, which the process that is copied never does.
    """
    folder = tmp_path_factory.mktemp("copies")
    command = [str(PYTHON), "-c", _COPIES, str(folder)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=variables(), text=True, **pipes) as process:  # type: ignore[call-overload]

        def run(program: str, gpu: Gpu | None = None, **options: Any) -> Ran:
            process.stdin.write(json.dumps({"program": program, "environ": variables(gpu, **options)}) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
            assert answer, "the process that is copied has ended"
            result = json.loads((folder / "result").read_text() or "{}")
            return Ran(result=result, exit_code=json.loads(answer), stderr=(folder / "stderr").read_text())

        yield run
        process.stdin.close()


@pytest.fixture(scope="session")
def small_card() -> Gpu:
    """Return a card of 1 GiB."""
    return card(gib=1)
