"""The formula against the real libraries, over every method that has a formula."""

from __future__ import annotations

import pytest

from whichlora.rehearse import rehearse
from whichlora_estimators.estimate import estimate
from whichlora_estimators.gpus import find_gpu
from whichlora_estimators.methods import all_methods
from whichlora_estimators.workload import Workload

pytestmark = pytest.mark.stack

SHARED = {"num_hidden_layers": 3, "vocab_size": 4000, "tie_word_embeddings": False, "max_position_embeddings": 2048}
LLAMA = {"model_type": "llama", "hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, **SHARED}
QWEN = {**LLAMA, "model_type": "qwen2", "num_key_value_heads": 2}
NEOX = {"model_type": "gpt_neox", "hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, **SHARED}


def workloads() -> list[Workload]:
    """One step of each method on three architectures; quantised where the method allows it, in turn."""
    made = []
    for index, method in enumerate(sorted(all_methods())):
        for config in (LLAMA, QWEN, NEOX):
            made.append(
                Workload(
                    id=f"{config['model_type']}-{method}",
                    model="small",
                    config=config,
                    method=method,
                    rank=8,
                    quantization="nf4" if index % 2 and method != "full" else "none",
                    checkpointing=config is QWEN and method != "prefix-tuning",  # PEFT refuses the two together
                    batch_size=4,
                    seq_len=512,
                )
            )
    return made


def test_every_method_takes_what_the_formula_says() -> None:
    """Trainable parameters are equal, allocated peaks within 1%, whatever the method."""
    card = find_gpu("a100-sxm-80gb")
    wrong = []
    for rehearsal in rehearse(workloads(), "unlimited", jobs=2):
        assert rehearsal.outcome == "ok", rehearsal.error
        found = estimate(rehearsal.workload, card)
        error = found.allocated_peak_bytes / rehearsal.allocated_peak_bytes - 1
        if found.trainable_params != rehearsal.trainable_params or abs(error) > 0.01:
            wrong.append((rehearsal.workload.id, found.trainable_params - rehearsal.trainable_params, error))
    assert not wrong
