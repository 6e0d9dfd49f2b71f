"""What a training shows while it runs: times and shapes of steps, peaks of memory, losses. All of it is also written down."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

#: A checkpoint with this file in it was written to its end.
COMPLETE = "complete"
ADALORA_FILE = "adalora.pt"
_SHARE_OF_LONGEST = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One optimizer step: samples and padded tokens of its largest micro-batch, tokens in all, and how long it took."""

    step: int
    batch_size: int
    width: int
    tokens: int
    seconds: float


@dataclass(slots=True)
class Seen:
    """What this process saw; peaks are (allocated, reserved) bytes by phase, of PyTorch's counters."""

    cuda: bool
    file: Path
    computes: bool = True  # not on the null device
    steps: list[Step] = field(default_factory=list)
    losses: list[tuple[int, float]] = field(default_factory=list)
    eval_losses: list[tuple[int, float]] = field(default_factory=list)
    peaks: dict[str, tuple[int, int]] = field(default_factory=dict)
    shapes: list[tuple[int, int]] = field(default_factory=list)
    began_s: float = 0.0
    phase: str = "load"

    def cut(self, next_phase: str) -> None:
        """End a phase: keep its peaks, if they are its highest, and begin to count for the next one."""
        if self.cuda and self.phase:
            import torch

            seen = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
            before = self.peaks.get(self.phase, (0, 0))
            self.peaks[self.phase] = max(before[0], seen[0]), max(before[1], seen[1])
            torch.cuda.reset_peak_memory_stats()
        self.phase = next_phase

    def begin_step(self) -> None:
        """Begin to time a step."""
        self.cut("train")
        self.shapes.clear()
        self.began_s = time.perf_counter()

    def end_step(self, number: int) -> None:
        """Wait for the device, then write down what the step took."""
        if self.cuda:
            import torch

            torch.cuda.synchronize()
        seconds = time.perf_counter() - self.began_s
        self.cut("evaluate")
        batch_size, width = max(self.shapes, key=lambda shape: shape[0] * shape[1])
        tokens = sum(rows * columns for rows, columns in self.shapes)
        step = Step(step=number, batch_size=batch_size, width=width, tokens=tokens, seconds=seconds)
        self.steps.append(step)
        self.write({"step": number, "batch_size": batch_size, "width": width, "tokens": tokens, "seconds": seconds})

    def write(self, line: dict[str, Any]) -> None:
        """Add a line to the run's log."""
        with self.file.open("a", encoding="utf-8") as log:
            log.write(json.dumps(line) + "\n")

    @property
    def longest(self) -> tuple[int, int]:
        """Samples and padded tokens of the largest micro-batch: it decided the peak."""
        steps = max(self.steps, key=lambda step: step.batch_size * step.width)
        return steps.batch_size, steps.width

    def times_of_longest(self) -> list[float]:
        """Return times of the steps about as large as the largest, without the first step, which makes and warms up."""
        batch_size, width = self.longest
        full = _SHARE_OF_LONGEST * batch_size * width
        return [step.seconds for step in self.steps[1:] if step.batch_size * step.width >= full]


class Stop:
    """Hears SIGTERM, as a scheduler sends it before it kills: the training then saves and ends at the next step."""

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None

    def __enter__(self) -> Stop:
        self._before = signal.signal(signal.SIGTERM, self._hear)
        return self

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.asked = True


def make_callback(seen: Seen, stop: Stop, *, adalora: bool, report: Callable[[str], None]) -> Any:
    """Return the callback that tells `seen` what happens, marks checkpoints as complete and heeds a wish to stop."""
    import transformers

    class Watch(transformers.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            seen.begin_step()

        def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
            if adalora:
                model.base_model.update_and_allocate(state.global_step)

        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            seen.end_step(state.global_step)
            if stop.asked:
                report(f"asked to stop: saving at step {state.global_step}")
                control.should_save = control.should_training_stop = True

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
            _log(seen, state, dict(logs or {}), report)

        def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            if adalora:
                save_ranks(model, folder)
            mark_complete(folder)

    return Watch()


def _log(seen: Seen, state: Any, logs: dict[str, Any], report: Callable[[str], None]) -> None:
    if not seen.computes:  # a loss is no number here; an evaluation's log would be the step's line again
        if "loss" in logs:
            report(f"step {state.global_step}/{state.max_steps}")
        return
    for name, kept in (("loss", seen.losses), ("eval_loss", seen.eval_losses)):
        if name in logs:
            kept.append((state.global_step, float(logs[name])))
            seen.write({"step": state.global_step, name: float(logs[name])})
    if "loss" in logs or "eval_loss" in logs:
        shown = ", ".join(f"{name} {float(logs[name]):.4f}" for name in ("loss", "eval_loss") if name in logs)
        report(f"step {state.global_step}/{state.max_steps}: {shown}")


# --- checkpoints ---


def mark_complete(folder: Path) -> None:
    """Mark a checkpoint as written to its end, once all of it is on disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    (folder / COMPLETE).touch()


def last_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint that was written to its end; others are removed, as a kill has left them."""
    import shutil

    found = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    for path in found:
        if not (path / COMPLETE).exists():
            shutil.rmtree(path, ignore_errors=True)
    whole = [path for path in found if (path / COMPLETE).exists()]
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def save_ranks(model: Any, folder: Path) -> None:
    """Keep what AdaLoRA knows beside its adapter: all weights (a checkpoint of PEFT's holds those of chosen ranks only)."""
    import torch

    allocator = model.base_model.rankallocator
    trainable = {name: value.detach().cpu() for name, value in model.named_parameters() if value.requires_grad}
    kept = {name: getattr(allocator, name) for name in ("ipt", "exp_avg_ipt", "exp_avg_unc")}
    kept["rank_pattern"] = model.peft_config[model.active_adapter].rank_pattern
    torch.save({"trainable": trainable, **kept}, folder / ADALORA_FILE)


def restore_ranks(model: Any, folder: Path) -> None:
    """Put back what `save_ranks` kept."""
    import torch

    device = next(model.parameters()).device
    kept = torch.load(folder / ADALORA_FILE, map_location=device, weights_only=True)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in kept["trainable"].items():
            parameters[name].copy_(value)
    for name in ("ipt", "exp_avg_ipt", "exp_avg_unc"):
        setattr(model.base_model.rankallocator, name, kept[name])
    model.peft_config[model.active_adapter].rank_pattern = kept["rank_pattern"]
