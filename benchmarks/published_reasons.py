"""Why an estimate differs from a published peak: what the source's versions, or its way to run, did otherwise.

Each was found by rehearsing under the source's versions, or by what its bytes are made of.
"""

from __future__ import annotations

from benchmarks.published_questions import Question

#: Prompts from here on show in qwen3's figures what they lack; with one token less than the whole cache shows.
PROMPT = 2


def reason(asked: Question) -> str:
    """Return what explains a difference, nothing where that is not known."""
    if asked.source == "fms-acceleration":
        return _fms(asked)
    if asked.source == "peft":
        return "a mean over batches of all lengths beside one batch of mean length; keys and values are kept as well"
    if asked.source == "qwen3":
        return _qwen3(asked)
    return ""


def reason_of_ratio(asked: Question) -> str:
    """Return what explains a method's bytes over LoRA's, nothing where that is not known."""
    if asked.workload.method == "lora-fa":
        # 28 layers, two targets of rank 32 over 3,072 inputs, fp32: 22.0 MB; 6.880 GB were left, 6.858 six months before
        return "A was not frozen in that run: after a step its gradients were left as well, 22 MB more than in the runs before"
    return "not known"


def _qwen3(asked: Question) -> str:
    if asked.workload.prefill_len < PROMPT:
        return "published is less than weights and the cache of all 2,048 tokens: it cannot be the peak of as many"
    return (
        "published is weights, whole cache and 35 to 50 MB at every length, less than even a copy of one layer's keys"
        " adds: no peak of a prompt that is read at once; the script in the source's repository reads peaks, but is not the"
        " table's, whose tokens/s count the prompt as well"
    )


def _fms(asked: Question) -> str:
    if asked.workload.config["model_type"] == "mixtral":
        return "its tokens are taken to spread evenly over the experts"
    return ""
