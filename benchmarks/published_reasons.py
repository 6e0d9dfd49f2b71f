"""Why an estimate differs from a published peak: what the source's versions, or its way to run, did otherwise.

Each was found by rehearsing under the source's versions, or by what its bytes are made of.
"""

from __future__ import annotations

from benchmarks.published_questions import Question

#: From this release on, logits stay 16-bit outside of the loss; before, the fp32 ones were the output.
LOGITS_AS_COMPUTED = (4, 46)
#: Up to this release rotary tables were kept by every layer.
ONE_ROTARY_TABLE = (4, 43)
#: Before this release the cache was a tuple of tensors, renewed as a whole at every token.
CACHE_OBJECTS = (4, 36)
#: From this release on a mixture's experts are one tensor of three dimensions, which bitsandbytes leaves as it is.
JOINED_EXPERTS = (5, 0)


def reason(asked: Question) -> str:
    """Return what explains a difference, nothing where that is not known."""
    if asked.source == "optimum-benchmark":
        return _optimum(asked)
    if asked.source == "fms-acceleration":
        return _fms(asked)
    if asked.source == "peft":
        return "a mean over batches of all lengths beside one batch of mean length; keys and values are kept as well"
    if asked.source == "qwen3":
        return "published is what weights and the whole cache take: activations of the prefill do not show in it"
    return ""


def _optimum(asked: Question) -> str:
    if asked.workload.decode_len == 1:
        return "another table of this source, under the same versions, has what the formula says"
    return "all layers' new keys and values beside the old ones: caches as tuples, before 4.36"


def _fms(asked: Question) -> str:
    version = _transformers(asked)
    if asked.workload.config["model_type"] == "mixtral" and version < JOINED_EXPERTS:
        return "experts as single linear layers, quantised; since 5.0 they are joined and stay 16-bit"
    found = []
    if version < ONE_ROTARY_TABLE and asked.workload.config["model_type"] == "mistral":
        found.append("a rotary table in every layer, 0.54 GB")
    if version < LOGITS_AS_COMPUTED:
        found.append(
            "fp32 logits are the output in these versions: a plain loop keeps it over backward, HF Trainer does not"
        )
    return "; ".join(found)


def _transformers(asked: Question) -> tuple[int, ...]:
    """Return the release; runs that name none are the oldest of their source."""
    text = dict(asked.versions).get("transformers", "0")
    return tuple(int(part) for part in text.split(".")[:2] if part.isdigit())
