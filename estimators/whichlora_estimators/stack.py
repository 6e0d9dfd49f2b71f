"""Library versions, and what they do differently: one table of behaviours, each with the release from which it holds.

Nothing else in the estimators knows a version. A release between two that were looked at counts as the older one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import NamedTuple

from .errors import BadValue, UnknownName

Release = tuple[int, ...]

#: What the formulas describe unless a stack says otherwise; every rehearsal of the tests that names no versions ran on it.
NEWEST: Mapping[str, str] = {
    "torch": "2.14.1",
    "transformers": "5.23.0",
    "peft": "0.21.2",
    "bitsandbytes": "0.50.2",
}


class Behaviour(NamedTuple):
    """Something that a package does from a release on: `since` it, as `source` shows."""

    package: str
    since: Release
    summary: str
    source: str


BOOL_MASKS = "sdpa takes masks of booleans"
DORA_REUSES_RESULT = "DoRA reuses the layer's result"
GROUPED_SDPA = "sdpa takes shared key-value heads as they are"
GROUPED_EFFICIENT = "memory-efficient attention takes shared key-value heads"
NO_PREFILL_MASK = "the prompt gets no mask in an empty static cache"
NO_PACKED_MASK = "a batch without mask and packing gets no mask"
SEARCHES_PACKED = "a batch without mask is searched for packing"
LOGITS_AS_COMPUTED = "logits keep the dtype of the head outside of the loss"
LABELS_SHIFTED = "labels are shifted, not logits"
FP32_ADAPTERS = "adapters are fp32 beside 16-bit weights"
JOINED_EXPERTS = "all experts of a layer are one weight"
PACKED_ROWS = "4-bit products of several rows read the packed weight"
KEEPS_NO_INPUT = "4-bit products keep no input for backward"
COMPUTES_AS_TOLD = "4-bit layers compute in the dtype that they were made with"

BEHAVIOURS: Mapping[str, Behaviour] = {
    GROUPED_SDPA: Behaviour(
        "transformers",
        (4, 54),
        "attention of grouped heads passes keys and values on instead of repeating them, where no mask is passed",
        "integrations/sdpa_attention.py of 4.53.3 and 4.54.1 (pull request 39412)",
    ),
    BOOL_MASKS: Behaviour(
        "transformers",
        (4, 53),
        "a mask is one boolean a query and key, which every layer's kernel converts; before, one float mask for all layers",
        "masking_utils.py of 4.53.3, models/llama/modeling_llama.py of 4.52.4",
    ),
    GROUPED_EFFICIENT: Behaviour(
        "torch",
        (2, 14),
        "grouped heads in fp32 run in the memory-efficient kernel; before, the math fallback kept all probabilities",
        "rehearsals with 2.6.0 and 2.14.1; pull request 191085",
    ),
    NO_PREFILL_MASK: Behaviour(
        "transformers",
        (5, 14),
        "the first tokens of a static cache are masked by the kernel; before, by a mask over all of the cache",
        "masking_utils.py of 5.13.0 and 5.14.0",
    ),
    SEARCHES_PACKED: Behaviour(
        "transformers",
        (4, 53),
        "position ids are searched for packed sequences in training without mask",
        "masking_utils.py of 4.52.4 and 4.53.3",
    ),
    NO_PACKED_MASK: Behaviour(
        "transformers",
        (5, 0),
        "where nothing is packed, no mask is made of that search; from 4.53 to 4.57 one always was",
        "masking_utils.py of 4.57.6 and 5.0.0",
    ),
    LOGITS_AS_COMPUTED: Behaviour(
        "transformers",
        (4, 46),
        "logits are converted to fp32 for the loss only, not in generation",
        "models/llama/modeling_llama.py of 4.45.2 and 4.46.3",
    ),
    LABELS_SHIFTED: Behaviour(
        "transformers",
        (4, 49),
        "the loss reads all logits; before, it copied all but the last position's in fp32",
        "loss/loss_utils.py of 4.48.3 and 4.49.0",
    ),
    JOINED_EXPERTS: Behaviour(
        "transformers",
        (5, 0),
        "a mixture's experts are one weight of three dimensions; before, linear layers of their own, run one by one",
        "models/mixtral/modeling_mixtral.py of 4.57.1 and 5.23.0; what bitsandbytes and PEFT take for a layer",
    ),
    DORA_REUSES_RESULT: Behaviour(
        "peft",
        (0, 14),
        "without dropout DoRA scales what the layer returned; before, it multiplied with the weight once more",
        "tuners/lora/dora.py of 0.13.2 and 0.14.0",
    ),
    FP32_ADAPTERS: Behaviour(
        "peft",
        (0, 12),
        "adapters of 16-bit weights are converted to fp32 (autocast_adapter_dtype)",
        "tuners/tuners_utils.py of 0.11.1 and 0.12.0",
    ),
    PACKED_ROWS: Behaviour(
        "bitsandbytes",
        (0, 50),
        "4-bit products of few rows read the packed weight; before, only those of one row did",
        "autograd/_functions.py of 0.45.0 and backends/cuda/ops.py of 0.50.2",
    ),
    KEEPS_NO_INPUT: Behaviour(
        "bitsandbytes",
        (0, 43, 2),
        "4-bit products no longer keep their input, which only a trained weight would want",
        "autograd/_functions.py of 0.43.1 and 0.43.2 (pull request 1270)",
    ),
    COMPUTES_AS_TOLD: Behaviour(
        "bitsandbytes",
        (0, 48),
        "4-bit layers compute in the dtype that they are told; before, in that of their first input if it was fp32",
        "nn/modules.py of 0.47.0 and 0.48.0 (set_compute_type)",
    ),
}

#: From which release of transformers on the prompt's logits can be left to the last position, by model_type.
_LAST_LOGITS: Mapping[str, Release] = {
    "falcon": (4, 47),
    "olmo2": (4, 47),
    "granite": (4, 48),
    "gpt_neox": (4, 49),
    "gpt2": (4, 53),
    "opt": (5, 0),
    "bloom": (5, 0),
}
_LAST_LOGITS_SINCE: Release = (4, 45)
#: From which release on a model takes the loss that all share, which converts logits to fp32 itself, by model_type.
_COMMON_LOSS: Mapping[str, Release] = {
    "starcoder2": (4, 47),
    "olmo2": (4, 47),
    "mistral": (4, 48),
    "granite": (4, 48),
    "gpt2": (4, 48),
    "opt": (4, 48),
    "bloom": (4, 48),
    "falcon": (4, 48),
    "stablelm": (4, 48),
    "gpt_neox": (4, 49),
}
_COMMON_LOSS_SINCE: Release = (4, 46)
#: Models whose own loss before that read logits in the dtype of the head.
_NEVER_UPCAST = frozenset({"gpt2", "gpt_neox", "opt", "bloom", "falcon", "stablelm", "olmo2"})

#: From which release on generation hands a model a cache that it fills (DynamicCache), by model_type; before, tuples of
#: tensors went from step to step (generation/utils.py of 4.41.2 and 4.42.4; `_supports_cache_class` of each model).
_CACHE_OBJECTS: Mapping[str, Release] = {
    "falcon": (4, 45),
    "gpt_neox": (4, 45),
    "bloom": (4, 45),
    "gpt2": (4, 52),
    "opt": (4, 52),
}
_CACHE_OBJECTS_SINCE: Release = (4, 42)
#: Models each of whose layers kept cos and sin of all positions that it was made for, and until which release.
_ROTARY_TABLES_UNTIL: Mapping[str, Release] = {
    "llama": (4, 41),
    "mistral": (4, 42),
    "mixtral": (4, 48),
    "qwen2": (4, 45),
    "qwen2_moe": (4, 45),
    "phi": (4, 45),
    "falcon": (4, 45),
    "gpt_neox": (4, 45),
    "stablelm": (4, 45),
    "starcoder2": (4, 45),
}

#: Models whose flash attention repeated shared keys and values for every query head, and until which release.
_FLASH_REPEATS_UNTIL: Mapping[str, Release] = {
    "mistral": (4, 48),
    "mixtral": (4, 48),
    "qwen2": (4, 48),
    "phi3": (4, 48),
    "starcoder2": (4, 48),
    "qwen2_moe": (5, 0),
}

#: From which release on a window makes a mask for sdpa where nothing is padded, by model_type; before, only eager had one.
_WINDOW_MASKS: Mapping[str, Release] = {
    "mistral": (4, 43),
    "mixtral": (4, 48),
    "phi3": (4, 48),
    "starcoder2": (4, 48),
    "qwen2": (4, 51),
    "qwen2_moe": (4, 48),
}

_RELEASE = re.compile(r"(\d+(?:\.\d+)*)[\w.+-]*", re.ASCII)


@dataclass(frozen=True, eq=True)
class Stack:
    """Versions of the libraries by package; packages that are not named have their newest known one.

    Raises UnknownName for a package that decides nothing here, BadValue for a version that is none.
    """

    versions: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        for package, version in self.versions:
            if package not in NEWEST:
                todo = f"Packages whose versions matter: {', '.join(NEWEST)}."
                raise UnknownName("package of a stack", package, NEWEST, todo=todo)
            _release(version)

    @cached_property
    def named(self) -> dict[str, str]:
        """Return the version of every package."""
        return {**NEWEST, **dict(self.versions)}

    @cached_property
    def behaviours(self) -> frozenset[str]:
        """Return what this stack does."""
        return frozenset(name for name, behaviour in BEHAVIOURS.items() if self._has(behaviour))

    def _has(self, behaviour: Behaviour) -> bool:
        return _release(self.named[behaviour.package]) >= behaviour.since

    def does(self, behaviour: str) -> bool:
        """Say whether a behaviour of the table holds."""
        return behaviour in self.behaviours

    def keeps_last_logits(self, model_type: str) -> bool:
        """Say whether a model can leave out the logits of all positions of the prompt but the last."""
        since = _LAST_LOGITS.get(model_type, _LAST_LOGITS_SINCE)
        return _release(self.named["transformers"]) >= since

    def keeps_rotary_tables(self, model_type: str) -> bool:
        """Say whether every layer of a model keeps cos and sin of all positions."""
        until = _ROTARY_TABLES_UNTIL.get(model_type)
        return until is not None and _release(self.named["transformers"]) < until

    def keeps_tuple_cache(self, model_type: str) -> bool:
        """Say whether a step of generation holds the keys and values of the last one, all layers', until it is over."""
        since = _CACHE_OBJECTS.get(model_type, _CACHE_OBJECTS_SINCE)
        return _release(self.named["transformers"]) < since

    def masks_windows(self, model_type: str) -> bool:
        """Say whether layers that see a window get a mask for sdpa where nothing is padded."""
        return _release(self.named["transformers"]) >= _WINDOW_MASKS.get(model_type, ())

    def repeats_for_flash(self, model_type: str) -> bool:
        """Say whether a model hands the flash-attn library shared keys and values once for every query head."""
        until = _FLASH_REPEATS_UNTIL.get(model_type)
        return until is not None and _release(self.named["transformers"]) < until

    def shares_loss(self, model_type: str) -> bool:
        """Say whether a model takes the loss that all share, which converts logits itself."""
        since = _COMMON_LOSS.get(model_type, _COMMON_LOSS_SINCE)
        return _release(self.named["transformers"]) >= since

    def upcasts_logits(self, model_type: str, *, training: bool) -> bool:
        """Say whether a model returns its logits in fp32, before the shared loss in training and once in generation too."""
        own = not self.shares_loss(model_type) if training else not self.does(LOGITS_AS_COMPUTED)
        return own and model_type not in _NEVER_UPCAST


#: Every package in its newest known version.
NEWEST_STACK = Stack()


def stack_of(versions: Mapping[str, str]) -> Stack:
    """Make a stack of versions by package, such as a measurement's environment holds; other packages are passed over."""
    return Stack(tuple(sorted((name, version) for name, version in versions.items() if name in NEWEST and version)))


def parse_stack(text: str) -> Stack:
    """Read "torch==2.6.0,transformers==4.57.6". Raises BadValue or UnknownName."""
    pairs = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        package, equals, version = part.partition("==")
        if not equals:
            todo = 'Write package==version, with commas between: "torch==2.6.0,transformers==4.57.6".'
            raise BadValue("a stack is a list of exact versions", value=part, todo=todo)
        pairs.append((package.strip(), version.strip()))
    return Stack(tuple(sorted(pairs)))


@cache
def _release(version: str) -> Release:
    """Read the numbers of a version: 2.6.0+cu124 is 2.6.0."""
    found = _RELEASE.fullmatch(version)
    if found is None:
        raise BadValue("not a version", value=version, todo="Give numbers with dots: 4.57.6.")
    return tuple(map(int, found[1].split(".")))
