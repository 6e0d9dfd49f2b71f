"""PyTorch's memory history around one workload."""

from __future__ import annotations

from typing import Any

from whichlora_estimators.workload import Workload

from .breakdown import break_down, to_json
from .records import LOAD
from .step import Recorder

_MOST_EVENTS = 10_000_000


class History:
    """Records from its making on; PyTorch allocates alike with and without. `workspace_bytes` is the size of cuBLAS's."""

    def __init__(self, workspace_bytes: int = 0) -> None:
        import torch

        self._workspace_bytes = workspace_bytes

        self._before_bytes = torch.cuda.memory_allocated()
        torch.cuda.memory._record_memory_history("all", context="all", stacks="python", max_entries=_MOST_EVENTS)

    def end(self, workload: Workload, recorder: Recorder) -> dict[str, Any]:
        """Stop, and return the breakdown of the peak of the steps (of loading, where that is all there was)."""
        import torch

        events = torch.cuda.memory._snapshot()["device_traces"][0]
        torch.cuda.memory._record_memory_history(None)
        steps = {name: peaks for name, peaks in recorder.peaks.items() if name != LOAD} or recorder.peaks
        found = break_down(
            events,
            allocated_peak_bytes=max((allocated for allocated, _ in steps.values()), default=0),
            before_bytes=self._before_bytes,
            since_us=recorder.loaded_us,
            logit_bytes=_logit_bytes(workload),
            workspace_bytes=self._workspace_bytes,
        )
        return to_json(found, stacks=True)


def _logit_bytes(workload: Workload) -> set[int]:
    """Return the sizes of logits, with or without the last position, in 2 or 4 bytes an element."""
    vocabulary = workload.config.get("vocab_size")
    if not isinstance(vocabulary, int):
        return set()
    length = workload.target_len or workload.seq_len
    if workload.phase == "generate":
        length = 1 if workload.task == "seq2seq" else workload.prefill_len
    return {workload.batch_size * n * vocabulary * size for n in (length, length - 1) for size in (2, 4)}
