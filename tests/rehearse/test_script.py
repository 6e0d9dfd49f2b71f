"""Scripts that know nothing of rehearsals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from whichlora.phantom import write_phantom
from whichlora_estimators.gpus import find_gpu

from .conftest import ROOT, TINY

pytestmark = pytest.mark.stack

SCRIPTS = ROOT / "examples" / "scripts"


STEPS = ("--batch-size", "16", "--steps", "2")

Seen = tuple[dict[str, Any], subprocess.CompletedProcess[str]]


def rehearsed(gpu: str, *command: str) -> Seen:
    program = [sys.executable, "-c", "from whichlora.cli import main; main(prog_name='whichlora')"]
    full = [*program, "rehearse", "--gpu", gpu, "--json", "--explain", "--no-smallest", "--", sys.executable, *command]
    done = subprocess.run(full, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr
    return json.loads(done.stdout), done


@pytest.fixture(scope="module")
def lora() -> Seen:
    """Return what the plain loop takes on a card of 80 GB."""
    return rehearsed("a100-sxm-80gb", str(SCRIPTS / "lora_loop.py"), *STEPS)


def test_a_plain_loop_fits_a_large_card(lora: Seen) -> None:
    """On 80 GB it trains, and its bytes are where PEFT and the loss hold them."""
    fits, done = lora
    assert (fits["outcome"], fits["ooms"], done.returncode) == ("ok", 0, 0)
    assert "step 1: loss" in done.stderr
    lines = {(line["component"], line["line"].split(":")[0]) for line in fits["breakdown"]["lines"]}
    assert ("activations", "peft/tuners/lora/layer.py") in lines
    assert ("logits and loss", "transformers/loss/loss_utils.py") in lines


def test_a_plain_loop_does_not_fit_a_small_card(lora: Seen) -> None:
    """On 24 GB it runs out, and the line of the script where it did is named."""
    large, done = rehearsed("rtx-4090", str(SCRIPTS / "lora_loop.py"), *STEPS)
    assert (large["outcome"], large["kind"], done.returncode) == ("oom", "OutOfMemoryError", 1)
    assert "lora_loop.py" in large["where"]
    assert large["process_bytes"] < 24 * 2**30 < lora[0]["process_bytes"]


def test_the_trainer_with_a_paged_optimizer(tmp_path: Path) -> None:
    """QLoRA of a checkpoint without weights runs from loading to the last step; paged state is not on the card."""
    write_phantom({**TINY, "hidden_size": 1024, "intermediate_size": 8192}, tmp_path)
    seen, done = rehearsed("rtx-4090", str(SCRIPTS / "qlora_trainer.py"), str(tmp_path), "--seq-len", "64")
    assert (seen["outcome"], done.returncode) == ("ok", 0), done.stderr
    assert seen["managed_peak_bytes"] > 0
    assert seen["breakdown"]["components"]["adapters"] > 0
    assert seen["versions"].keys() >= {"accelerate", "bitsandbytes", "cuda"}


def test_lora_fa_keeps_less_than_lora(lora: Seen) -> None:
    """PEFT's helper freezes every A, so the inputs cast for A's gradient are not kept; its step runs."""
    lora_fa, done = rehearsed("a100-sxm-80gb", str(SCRIPTS / "lora_fa.py"), *STEPS)
    assert lora_fa["outcome"] == "ok", done.stderr
    assert lora_fa["breakdown"]["components"]["activations"] < lora[0]["breakdown"]["components"]["activations"]
    assert lora_fa["allocated_peak_bytes"] < lora[0]["allocated_peak_bytes"]


def test_peaks_that_a_script_forgets_are_kept(tmp_path: Path) -> None:
    """A script that begins new peaks, and one that catches its out-of-memory error, are told of all the same."""
    script = tmp_path / "forgets.py"
    script.write_text(
        "import torch\n"
        "torch.empty(2**30, dtype=torch.uint8, device='cuda')\n"
        "torch.cuda.reset_peak_memory_stats()\n"
        "try: torch.empty(2**40, dtype=torch.uint8, device='cuda')\n"
        "except torch.OutOfMemoryError: pass\n"
        "raise SystemExit(3)\n"
    )
    seen, done = rehearsed("rtx-4090", str(script))
    assert seen["allocated_peak_bytes"] == 2**30
    assert seen["ooms"] == 1
    assert seen["exit_code"] == done.returncode == 3


def test_a_command_that_is_not_there_exits_2() -> None:
    """Its name is in the message."""
    program = [sys.executable, "-c", "from whichlora.cli import main; main(prog_name='whichlora')"]
    done = subprocess.run(
        [*program, "rehearse", "--gpu", "l4", "--", "no-such-program"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "no-such-program" in done.stderr


def test_the_smallest_card_is_rehearsed(tmp_path: Path) -> None:
    """A script that needs 13 GiB ran out on a card of 12 GB, and fits the one of 16 GB that it was run on again."""
    script = tmp_path / "needs.py"
    script.write_text("import torch\ntorch.empty(13 * 2**30, dtype=torch.uint8, device='cuda')\n")
    program = [sys.executable, "-c", "from whichlora.cli import main; main(prog_name='whichlora')", "rehearse"]
    done = subprocess.run(
        [*program, "--gpu", "rtx-4070", "--json", "--", sys.executable, str(script)], capture_output=True, text=True
    )
    assert done.returncode == 1, done.stderr
    smallest = find_gpu(json.loads(done.stdout)["smallest_card"])
    assert smallest.nominal_gb == 16
    assert f"again on {smallest.name}" in done.stderr
