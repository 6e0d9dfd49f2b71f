"""Laws of what is said beside a prediction."""

from __future__ import annotations

from dataclasses import replace

import pytest

from whichlora_estimators.caveats import caveats
from whichlora_estimators.estimate import estimate
from whichlora_estimators.families import all_families
from whichlora_estimators.gpus import find_gpu
from whichlora_estimators.models import load_model
from whichlora_estimators.stack import NEWEST_STACK, parse_stack
from whichlora_estimators.workload import Workload


def workload(name: str, **setup: object) -> Workload:
    shape = load_model(name, offline=True)
    return Workload(model=shape.name, config=shape.config, **setup)  # type: ignore[arg-type]


def test_a_dense_model_has_none() -> None:
    """Nothing is said of QLoRA of a Llama."""
    assert caveats(workload("meta-llama/Llama-3.1-8B", quantization="nf4")) == ()


def test_unquantised_experts_are_told_of_where_they_are_unquantised() -> None:
    """A mixture's nf4 is told of under Transformers 5, where the weights show it, and not before."""
    found = workload("mistralai/Mixtral-8x7B-v0.1", quantization="nf4", method="lora", targets=("q_proj",))
    old = parse_stack("transformers==4.57.6")
    assert [text.startswith("since transformers 5 bitsandbytes") for text in caveats(found)] == [True]
    assert caveats(found, old) == ()
    short = replace(found, config={**found.config, "num_hidden_layers": 1})
    new_bytes, old_bytes = (
        estimate(short, find_gpu("h200"), stack=stack).breakdown["weights"] for stack in (NEWEST_STACK, old)
    )
    assert new_bytes > 3 * old_bytes


@pytest.mark.parametrize("name", [name for name, recipe in all_families().items() if recipe.stack_names])
def test_adapted_experts_are_told_of(name: str) -> None:
    """Where all-linear reaches stacked experts, that is said; named layers of attention are not worth a word."""
    found = Workload(model=name, config={"model_type": name}, method="lora")
    assert "adapts the experts too" in caveats(found)[0]
    assert caveats(replace(found, targets=("q_proj",))) == ()


@pytest.mark.parametrize(
    ("name", "longest"),
    [("bert-base-uncased", 512), ("roberta-base", 512), ("gpt2", 1024), ("facebook/opt-125m", 2048)],
)
def test_texts_beyond_the_table_of_positions_are_told_of(name: str, longest: int) -> None:
    """A text, or a prompt and its answer, may be as long as the table, no longer; a T5 has none."""
    task = all_families()[load_model(name, offline=True).family].tasks[0]
    fits, too_long = (workload(name, task=task, method="full", seq_len=length) for length in (longest, longest + 1))
    assert (caveats(fits), len(caveats(too_long))) == ((), 1)
    reads = replace(fits, phase="generate", prefill_len=longest, decode_len=2)
    assert len(caveats(reads)) == (task == "causal")
    assert caveats(workload("t5-small", task="seq2seq", phase="generate", prefill_len=10 * longest)) == ()
