"""A workload run by the real libraries: load, then training steps, or prefill and decode, phase by phase.

The same code runs on the null device and on a real card; what differs is the recorder that it is given.
"""

from __future__ import annotations

import contextlib
import inspect
import time
from collections.abc import Iterator
from typing import Any

from whichlora_estimators.errors import Unsupported
from whichlora_estimators.workload import Workload

from .adapters import OPTIMIZERS, adapt
from .models import build_model

#: The first step makes the optimizer's state; from the second on every step is alike.
STEPS = 3
_AUTOCAST = {"bf16-mixed": "bfloat16", "fp16-mixed": "float16"}


class Recorder:
    """Keeps what PyTorch's counters show: `counts` by name, `peaks` by phase as (allocated, reserved) bytes.

    `current` is the phase that runs or, after an error, the one that it struck in. Subclasses see phases begin and end.
    """

    device = "cuda"

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.peaks: dict[str, tuple[int, int]] = {}
        self.current = ""
        self.loaded_us = 0  # since the epoch; of what comes later the peaks are told

    def mask_is_full(self, full: bool) -> None:
        """Hear whether an attention mask, if one is asked about, would be all ones: a card that computes reads it."""

    def count_allocated(self, name: str) -> None:
        """Keep what is allocated now."""
        import torch

        self.counts[name] = torch.cuda.memory_allocated()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure what runs inside; a phase that comes several times keeps its highest peaks."""
        import torch

        self.current = name
        torch.cuda.reset_peak_memory_stats()
        try:
            yield
        finally:
            allocated, reserved = self.peaks.get(name, (0, 0))
            seen = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
            self.peaks[name] = max(allocated, seen[0]), max(reserved, seen[1])
        self.current = ""
        if name == "load":
            self.loaded_us = time.time_ns() // 1000


def run(workload: Workload, recorder: Recorder) -> None:
    """Run a workload that `adapters.check` let through; the recorder then holds what was seen.

    Raises whatever the libraries raise, `torch.OutOfMemoryError` first of all.
    """
    recorder.mask_is_full(not workload.padded)
    (_generate if workload.phase == "generate" else _train)(workload, recorder)


def _train(workload: Workload, recorder: Recorder) -> None:
    import torch

    with recorder.phase("load"):
        model = build_model(workload, recorder.device)
        recorder.count_allocated("weights_bytes")
        model = adapt(model, workload)
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        recorder.counts["trainable_params"] = sum(parameter.numel() for parameter in trainable)
        optimizer = OPTIMIZERS[workload.optimizer](trainable)
        inputs = _inputs(workload, recorder.device)
        recorder.count_allocated("model_bytes")
    scaler = torch.amp.GradScaler(recorder.device, enabled=workload.precision == "fp16-mixed")
    for _ in range(STEPS):
        _step(model, inputs, optimizer, scaler, workload, recorder)


def _step(
    model: Any, inputs: dict[str, Any], optimizer: Any, scaler: Any, workload: Workload, recorder: Recorder
) -> None:
    """Forward, backward, optimizer. The output, and so the logits, lives until backward is over, as in a plain loop."""
    with recorder.phase("forward"), _autocast(workload, recorder.device):
        output = model(**inputs)
    with recorder.phase("backward"):
        scaler.scale(output.loss).backward()
        del output
    with recorder.phase("optimizer"):
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()


def _autocast(workload: Workload, device: str) -> Any:
    import torch

    dtype = getattr(torch, _AUTOCAST.get(workload.precision, "bfloat16"))
    return torch.autocast(device, dtype=dtype, enabled=workload.precision in _AUTOCAST)


def _inputs(workload: Workload, device: str) -> dict[str, Any]:
    """Return a batch of token 0, its labels, and with padding a mask that hides the last token of the first sample."""
    import torch

    shape = (workload.batch_size, workload.seq_len)
    tokens = torch.zeros(shape, dtype=torch.long, device=device)
    inputs = {"input_ids": tokens}
    if workload.padded:
        inputs["attention_mask"] = torch.ones_like(tokens)
        inputs["attention_mask"][0, -1] = 0
    labels = {
        "causal": shape,
        "seq-cls": shape[:1],
        "seq2seq": (workload.batch_size, workload.target_len or workload.seq_len),
    }
    inputs["labels"] = torch.zeros(labels[workload.task], dtype=torch.long, device=device)
    return inputs


def _generate(workload: Workload, recorder: Recorder) -> None:
    """Prefill with a growing cache, then one token at a time, each the likeliest."""
    import torch

    with torch.inference_mode():
        with recorder.phase("load"):
            model = build_model(workload, recorder.device).eval()
            recorder.count_allocated("weights_bytes")
            shape = (workload.batch_size, workload.prefill_len)
            ids = torch.zeros(shape, dtype=torch.long, device=recorder.device)
        recorder.counts["trainable_params"] = 0
        with recorder.phase("prefill"):
            output = model(input_ids=ids, use_cache=True, **_logits(model, workload))
        for _ in range(workload.decode_len - 1):
            with recorder.phase("decode"):
                token = output.logits[:, -1:].argmax(-1)
                ids = torch.cat([ids, token], 1)
                output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)


def _logits(model: Any, workload: Workload) -> dict[str, int]:
    """Return the argument that keeps the last position's logits only, by both names that it has had."""
    if not workload.last_logits_only:
        return {}
    known = inspect.signature(model.forward).parameters
    for name in ("logits_to_keep", "num_logits_to_keep"):
        if name in known:
            return {name: 1}
    todo = "Set last_logits_only to false (--all-logits): this version computes them all."
    raise Unsupported("this model cannot leave out logits of the prompt", value=type(model).__name__, todo=todo)
