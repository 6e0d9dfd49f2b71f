"""What a user would not expect of a workload, and what it costs: said beside its prediction."""

from __future__ import annotations

from collections.abc import Iterator

from .families import find_family
from .methods import find_method
from .stack import JOINED_EXPERTS, NEWEST_STACK, Stack
from .workload import Workload


def caveats(workload: Workload, stack: Stack = NEWEST_STACK) -> tuple[str, ...]:
    """Return a sentence for each surprise; none for most workloads. Raises UnknownName for an architecture without recipe."""
    return (*_of_mixtures(workload, stack), *_of_lengths(workload))


def _of_lengths(workload: Workload) -> Iterator[str]:
    """Yield that texts are longer than the table of positions, which no rehearsal would find: it looks nothing up."""
    recipe = find_family(str(workload.config.get("model_type")))
    longest = recipe.longest(recipe.read(workload.config))
    length = workload.seq_len if workload.phase == "train" else workload.prefill_len + workload.decoded
    if longest is not None and length > longest:
        yield f"it has positions for {longest:,} tokens: a text of {length:,} ends in an error on a card"


def _of_mixtures(workload: Workload, stack: Stack) -> Iterator[str]:
    """Yield what Transformers 5 does to mixtures of experts (docs/mixtures.md)."""
    recipe = find_family(str(workload.config.get("model_type")))
    if "num_experts_per_tok" not in recipe.defaults or not stack.does(JOINED_EXPERTS):
        return
    trains = workload.phase == "train"
    if workload.quantization != "none":
        text = "since transformers 5 bitsandbytes quantises none of the experts: they stay in 16 bit"
        if trains and workload.kbit_preparation:
            text += ", and preparing for k-bit training makes them fp32 (kbit_preparation=false leaves that out)"
        yield text
    reached = workload.targets == "all-linear" and bool(recipe.stack_names)
    if trains and reached and find_method(workload.method).has_rank_pattern:  # those of PEFT's LoraConfig
        yield (
            "all-linear adapts the experts too, and makes a second copy of them in every pass; "
            "q_proj,k_proj,v_proj,o_proj leaves them alone"
        )
