"""A few steps of PEFT's MetaMathQA comparison, as anybody's script: times them with CUDA events and prints the mean.

    whichlora rehearse --time --gpu l40s -- python benchmarks/peft_step.py METHOD

METHOD is lora, dora, adalora, lora-fa, ia3 or full; Llama-3.2-3B's shape in bf16, batches of 4 with 220 tokens, one of
which is padding. On a card it prints what the card takes, on the null device under --time what that card would.
"""

from __future__ import annotations

import statistics
import sys
from itertools import pairwise
from typing import Any

import peft
import torch
import transformers

BATCH, TOKENS, RANK, STEPS = 4, 220, 32, 5
#: AdaLoRA prunes from step 200 on and keeps what it has from 4,500 of 5,000 on: a step of each stage, and its share of the run.
STAGES = {"adalora": ((100, 0.04), (1000, 0.86), (4800, 0.1))}
SHAPE = {
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
}


def _lora(**more: Any) -> Any:
    return peft.LoraConfig(r=RANK, lora_alpha=64, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **more)


def _config(method: str) -> Any:
    if method == "adalora":
        return peft.AdaLoraConfig(
            init_r=64, target_r=RANK, total_step=5000, tinit=200, tfinal=500, task_type="CAUSAL_LM"
        )
    if method == "ia3":
        return peft.IA3Config(task_type="CAUSAL_LM")
    return _lora(use_dora=method == "dora")


def _optimizer(method: str, model: Any) -> torch.optim.Optimizer:
    if method == "lora-fa":
        from peft.optimizers import create_lorafa_optimizer

        return create_lorafa_optimizer(model=model, r=RANK, lora_alpha=64, lr=1e-4, weight_decay=0.1)
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)


def main(method: str) -> None:
    """Train and print the median step."""
    config: Any = transformers.LlamaConfig(**SHAPE)  # type: ignore[arg-type]
    with torch.device("cuda"):
        model: Any = transformers.AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, dtype=torch.bfloat16
        )
    model = model if method == "full" else peft.get_peft_model(model, _config(method))
    optimizer = _optimizer(method, model)
    ids = torch.zeros(BATCH, TOKENS, dtype=torch.long, device="cuda")
    mask = torch.ones_like(ids)
    mask[0, -1] = 0
    mean_ms = sum(share * _step_ms(model, optimizer, ids, mask, at) for at, share in STAGES.get(method, ((0, 1.0),)))
    print(f"{method}: {mean_ms:.1f} ms a step")


def _step_ms(model: Any, optimizer: torch.optim.Optimizer, ids: torch.Tensor, mask: torch.Tensor, at: int) -> float:
    """Train a few steps, which the model takes for step number `at` (0: it does not ask), and return the median."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(STEPS + 1)]  # type: ignore[no-untyped-call]
    for event in events:
        event.record()
        output = model(input_ids=ids, attention_mask=mask, labels=ids)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        if at:
            model.base_model.update_and_allocate(at)
        optimizer.zero_grad()
        output.loss.item()
    torch.cuda.synchronize()
    return float(statistics.median(before.elapsed_time(after) for before, after in pairwise(events[1:])))


if __name__ == "__main__":
    main(sys.argv[1])
