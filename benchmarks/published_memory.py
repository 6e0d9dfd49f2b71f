"""What the formula says of the memory counters that publications give.

# B batch, T tokens, V vocabulary, L layers
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache

from benchmarks.published_rows import AFTER_STEP, PROCESS
from whichlora_estimators.estimate import Estimate, estimate
from whichlora_estimators.gpus import Gpu, find_gpu
from whichlora_estimators.replayed import rounded_sizes
from whichlora_estimators.stack import Stack, stack_of
from whichlora_estimators.timeline import lay
from whichlora_estimators.workload import Workload, workload_from_json
from whichlora_profiles_db import workload_to_json


def predicted_bytes(workload: Workload, gpu: Gpu, counter: str, versions: Mapping[str, str]) -> int:
    """Predict one counter of a workload on a card under some versions. Raises WhichloraError for what has no formula."""
    key, stack = json.dumps(workload_to_json(workload), sort_keys=True), stack_of(versions)
    if counter == AFTER_STEP:
        return _after_step(key, stack) + _outputs_bytes(workload)
    found = _estimated(key, gpu.slug, stack)
    return found.process_bytes if counter == PROCESS else int(getattr(found, counter))


@cache
def _estimated(key: str, gpu: str, stack: Stack) -> Estimate:
    return estimate(workload_from_json(json.loads(key)), find_gpu(gpu), stack=stack)


@cache
def _after_step(key: str, stack: Stack) -> int:
    """Return the bytes that are live once the optimizer has first stepped and before gradients are dropped."""
    timeline = lay(workload_from_json(json.loads(key)), stack=stack)
    sizes, live = rounded_sizes(timeline), 0
    for segment in (timeline.setup, *timeline.order):
        for event in timeline.tape.events[segment.first.event : segment.last.event]:
            live += sizes[event] if event >= 0 else -sizes[~event]
        if segment.label == "optimizer step":
            break
    return live


def _outputs_bytes(workload: Workload) -> int:
    """Return the bytes of a 16-bit output that is kept over the step: logits [B, T, V], keys and values of L layers."""
    config = workload.config
    virtual = workload.num_virtual_tokens if workload.method in ("p-tuning", "prompt-tuning") else 0
    tokens = workload.batch_size * (workload.seq_len + virtual)
    heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return int(2 * tokens * (config["vocab_size"] + 2 * config["num_hidden_layers"] * heads * width))
