"""Scripts that know nothing of rehearsals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from whichlora.rehearse.script import ScriptRun, _python_of, comes_from_stdin, rehearse_script
from whichlora_estimators.errors import WhichloraError
from whichlora_estimators.gpus import find_gpu

from .conftest import ROOT, TINY

pytestmark = pytest.mark.stack

SCRIPTS = ROOT / "examples" / "scripts"
WHICHLORA = (sys.executable, "-c", "from whichlora.cli import main; main(prog_name='whichlora')")

# Every example, one after the other, in a process that has imported the libraries once.
EXAMPLES = """
import gc, runpy, sys, torch
from whichlora.phantom import write_phantom

def run(name, *arguments):
    torch.cuda.reset_peak_memory_stats()
    sys.argv = [name, *arguments]
    runpy.run_path(f"{sys.path[0]}/{name}", run_name="__main__")
    print("peak of", name, torch.cuda.max_memory_allocated())
    gc.collect()
    torch.cuda.empty_cache()

folder, config = sys.argv[1], eval(sys.argv[2])
sys.path[0] = sys.argv[3]
run("lora_loop.py", "--batch-size", "16", "--steps", "2")
run("lora_fa.py", "--batch-size", "16", "--steps", "2")
write_phantom(config, folder)
run("qlora_trainer.py", folder, "--seq-len", "64")
"""

NEEDS_182_GIB = """
import torch

def take(gib):
    return torch.empty(gib * 2**30, dtype=torch.uint8, device="cuda")

take(2)
torch.cuda.reset_peak_memory_stats()
try:
    take(1024)
except torch.OutOfMemoryError:
    pass
try:
    take(182)
except torch.OutOfMemoryError as error:
    raise RuntimeError("no room for that much") from error
"""

# A process that multiprocessing forks uses the card, and the script waits for the user to lose patience.
WAITS = """
import multiprocessing, time

def child():
    import torch
    torch.empty(2**30, dtype=torch.uint8, device="cuda")

process = multiprocessing.get_context("fork").Process(target=child)
process.start()
process.join()
print("waiting", flush=True)
time.sleep(60)
"""


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> tuple[ScriptRun, str]:
    """Return what the examples take on a card of 80 GB, and what they say."""
    folder = tmp_path_factory.mktemp("examples")
    (folder / "all.py").write_text(EXAMPLES)
    config = {**TINY, "hidden_size": 1024, "intermediate_size": 8192}
    command = [sys.executable, str(folder / "all.py"), str(folder / "phantom"), repr(config), str(SCRIPTS)]
    with (folder / "said").open("w") as file:
        run = rehearse_script(command, "a100-sxm-80gb", explain=True, stdout=file, stderr=subprocess.STDOUT)
    return run, (folder / "said").read_text()


def peak_of(name: str, said: str) -> int:
    (line,) = [line for line in said.splitlines() if line.startswith(f"peak of {name}")]
    return int(line.split()[-1])


def test_a_plain_loop_fits_a_large_card(examples: tuple[ScriptRun, str]) -> None:
    """On 80 GB it trains, and its bytes are where PEFT and the loss hold them."""
    run, said = examples
    assert (run.outcome, run.ooms, run.exit_code) == ("ok", 0, 0), said
    assert said.count("step 1: loss") == 2
    assert run.allocated_peak_bytes == peak_of("lora_loop.py", said)
    assert run.breakdown
    lines = {(component, line.split(":")[0]) for component, line in run.breakdown.lines}
    assert ("activations", "peft/tuners/lora/layer.py") in lines
    assert ("logits and loss", "transformers/loss/loss_utils.py") in lines
    assert run.breakdown.components["adapters"] > 0


def test_lora_fa_keeps_less_than_lora(examples: tuple[ScriptRun, str]) -> None:
    """PEFT's helper freezes every A, so the inputs cast for A's gradient are not kept: those of rank 128 take less."""
    _, said = examples
    inputs = 4 * 16 * 1024 * 16 * (3 * 2048 + 8192)  # fp32, batch, tokens, layers: widths of four different inputs
    assert peak_of("lora_fa.py", said) < peak_of("lora_loop.py", said) - 0.8 * inputs


def test_the_trainer_with_a_paged_optimizer(examples: tuple[ScriptRun, str]) -> None:
    """QLoRA of a checkpoint without weights runs from loading to the last step; paged state is not on the card."""
    run, said = examples
    assert 0 < peak_of("qlora_trainer.py", said) < 2**30
    assert (run.managed_peak_bytes or 0) > 0
    assert run.versions.keys() >= {"accelerate", "bitsandbytes", "cuda"}


def test_the_smallest_card_is_rehearsed(tmp_path: Path) -> None:
    """What ran out on 141 GB is told with its line, what it forgot or caught too; run again it fits 186 GB, not 180."""
    script = tmp_path / "needs.py"
    script.write_text(NEEDS_182_GIB)
    command = [
        *WHICHLORA,
        "rehearse",
        "--gpu",
        "h200-sxm-141gb",
        "--json",
        "--explain",
        "--",
        sys.executable,
        str(script),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    seen = json.loads(done.stdout)
    assert (seen["outcome"], seen["kind"], seen["exit_code"]) == ("oom", "OutOfMemoryError", 1)
    assert (seen["ooms"], seen["allocated_peak_bytes"]) == (2, 2 * 2**30)
    assert seen["process_bytes"] < find_gpu("h200-sxm-141gb").total_bytes
    assert "needs.py:5 in take" in seen["where"]
    assert sum(seen["breakdown"]["components"].values()) == seen["allocated_peak_bytes"]
    smallest = find_gpu(seen["smallest_card"])
    assert smallest.nominal_gb == 186
    assert f"again on {smallest.name}" in done.stderr
    assert f"again on {find_gpu('b200').name}" in done.stderr


def _heeding_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # which a shell's background jobs ignore, and hand on


def test_an_interrupted_script_tells_what_it_took() -> None:
    """Ctrl-C ends script and rehearsal with 130, and the peak of a process that ended before is there."""
    command = [*WHICHLORA, "rehearse", "--gpu", "l4", "--", sys.executable, "-c", WAITS]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes, start_new_session=True, preexec_fn=_heeding_interrupts) as process:
        assert process.stderr
        assert "waiting\n" in iter(process.stderr.readline, "")
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in said
    assert "allocated peak: 1.00 GiB" in said


@pytest.mark.parametrize(
    ("program", "status", "shown"),
    [
        ("import sys; print('heard', sys.argv[1]); raise SystemExit(3)", 3, "exit status 3"),
        ("import os; print('heard', 7, flush=True); os.kill(os.getpid(), 9)", 137, "SIGKILL"),
    ],
)
def test_the_exit_status_is_the_script_s(program: str, status: int, shown: str) -> None:
    """A program that comes from stdin has its arguments; its status is ours, or 128 and the signal that ended it."""
    command = [*WHICHLORA, "rehearse", "--gpu", "l4", "--", sys.executable, "-", "7"]
    done = subprocess.run(command, input=program, capture_output=True, text=True)
    assert done.returncode == status
    assert "heard 7" in done.stderr
    assert f"failed ({shown})" in done.stdout


def test_a_command_that_does_not_run_exits_2(tmp_path: Path) -> None:
    """Its name is in the message, whether it is not there or no program."""
    nothing = tmp_path / "nothing"
    nothing.touch(mode=0o755)
    for command in ("no-such-program", str(nothing)):
        done = subprocess.run([*WHICHLORA, "rehearse", "--gpu", "l4", "--", command], capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (2, "")
        assert command in done.stderr


def test_an_environment_that_is_not_activated_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where PATH lacks a program, or its python lacks PyTorch, the error names those beside the Python that runs us."""
    ours = Path(sys.executable)
    (tmp_path / "python").write_text(f'#!/bin/sh\nexec env PYTHONPATH= "{ours}" -S "$@"\n')
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(WhichloraError, match=f"no PyTorch: '{tmp_path}/python'.* name {ours} instead"):
        rehearse_script(["python", "train.py"], "l4")
    with pytest.raises(WhichloraError, match=f"no such command: 'accelerate launch'.* name {ours.parent}/accelerate"):
        rehearse_script(["accelerate", "launch"], "l4")


def test_a_launcher_runs_on_the_device_of_its_own_python(tmp_path: Path) -> None:
    """Scripts that pip installs name their Python, on the first line or, where that is too long, on the second."""
    there = str(Path(sys.executable))
    for head, python in (
        (f"#!{there}", there),
        (f"#!/bin/sh\n'''exec' {there} \"$0\" \"$@\"\n' '''", there),
        ("#!/bin/bash\necho python", there),  # no Python's own: what it runs is taken to be ours
    ):
        (tmp_path / "launch").write_text(f"{head}\nimport sys\n")
        assert _python_of(tmp_path / "launch") == Path(python)
    assert _python_of(Path("/elsewhere/python3.12")) == Path("/elsewhere/python3.12")


@pytest.mark.parametrize(
    ("words", "stdin"),
    [
        ("-", True),
        ("- a b", True),
        ("-u -W ignore", True),
        ("-u train.py -", False),
        ("-c pass", False),
        ("-m a", False),
    ],
)
def test_programs_from_stdin_are_known(words: str, stdin: bool) -> None:
    """Python reads its program from stdin where no file, module or text is named."""
    assert comes_from_stdin(["python3", *words.split()]) == stdin
    assert not comes_from_stdin(["bash", *words.split()])
