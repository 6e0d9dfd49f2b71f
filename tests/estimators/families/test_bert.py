"""BERT against the real libraries."""

from __future__ import annotations

from pathlib import Path

import pytest

from whichlora_estimators.timeline import lay
from whichlora_estimators.workload import Workload

from ..golden import check_golden, check_parameters

CASES = Path(__file__).with_name("golden_bert.jsonl")


def test_golden_cases() -> None:
    """Requested peaks are within 0.05% of what the null device measured, allocated ones within unsplit blocks of it."""
    check_golden(CASES, tolerance=0.025, requested_tolerance=0.0005)


@pytest.mark.stack
def test_parameters_are_those_of_the_real_model() -> None:
    """Every weight has the shape that Transformers gives it, for every config of the golden cases."""
    check_parameters(CASES)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_classifier_always_trains(method: str) -> None:
    """The head of a classification trains whole beside adapters, as PEFT saves it, and once in full fine-tuning."""
    workload = Workload(model="bert", config=CONFIG, task="seq-cls", method=method, targets=("query",), rank=1)
    classifier = 256 * 2 + 2
    query_adapters, everything = 2 * (256 + 256), lay(workload.with_(method="full")).trainable_params
    assert lay(workload).trainable_params == (everything if method == "full" else classifier + query_adapters)


def test_labels_are_those_of_the_config() -> None:
    """A named label is one row of the classifier."""
    named = {**CONFIG, "id2label": {str(label): f"label {label}" for label in range(7)}}
    two, seven = (lay(Workload(model="bert", config=c, task="seq-cls", method="full")) for c in (CONFIG, named))
    assert seven.trainable_params - two.trainable_params == 5 * (256 + 1)


CONFIG = {
    "model_type": "bert",
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "vocab_size": 1000,
}
