"""Why an estimate differs from a published peak: what the source's versions, or its way to run, did otherwise.

Each was found by rehearsing under the source's versions, or by what its bytes are made of.
"""

from __future__ import annotations

from benchmarks.published_questions import Question

#: From this release on, fms-acceleration's rows with k-bit preparation ran under PyTorch 2.4 and bitsandbytes 0.43.2.
TORCH_2_4 = (4, 43)
#: Prompts from here on show in qwen3's figures what they lack; with one token less than the whole cache shows.
PROMPT = 2


def reason(asked: Question) -> str:
    """Return what explains a difference, nothing where that is not known."""
    if asked.source == "optimum-benchmark":
        return _optimum(asked)
    if asked.source == "fms-acceleration":
        return _fms(asked)
    if asked.source == "peft":
        return "a mean over batches of all lengths beside one batch of mean length; keys and values are kept as well"
    if asked.source == "qwen3":
        return _qwen3(asked)
    return ""


def _optimum(asked: Question) -> str:
    if asked.workload.decode_len == 1:
        return "another table of this source, under the same versions, has what the formula says"
    return ""


def _qwen3(asked: Question) -> str:
    if asked.workload.prefill_len < PROMPT:
        return "published is less than weights and the cache of all 2,048 tokens: it cannot be the peak of as many"
    return (
        "published is weights, whole cache and 35 to 50 MB at every length, less than even a copy of one layer's keys"
        " adds: no peak of a prompt that is read at once; the script in the source's repository reads peaks, but is not the"
        " table's, whose tokens/s count the prompt as well"
    )


def _fms(asked: Question) -> str:
    version, prepared = _transformers(asked), asked.workload.kbit_preparation
    mixture = asked.workload.config["model_type"] == "mixtral"
    if asked.workload.quantization == "none":
        return ""
    if not prepared:
        return (
            "tokens spread unevenly over experts, or PyTorch 2.2, which was not rehearsed: not known" if mixture else ""
        )
    if version >= TORCH_2_4:
        copies = "16-bit copies of fp32 queries, keys and values for flash attention: as many bytes as are missing for Mistral"
        return f"{copies}; more for the mixture: not known" if mixture else copies
    return (
        "not known: 102,400 bytes a token are missing for Mistral, more for Mixtral, none of them from 4.43 on (but for flash"
        " attention's 12,288); PyTorch 2.2 and bitsandbytes 0.43.1, which were not rehearsed"
    )


def _transformers(asked: Question) -> tuple[int, ...]:
    """Return the release; runs that name none are the oldest of their source."""
    text = dict(asked.versions).get("transformers", "0")
    return tuple(int(part) for part in text.split(".")[:2] if part.isdigit())
