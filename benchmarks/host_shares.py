"""What the host takes for a launch, by who calls for it: modules, autograd, loops over tensors, operators on lists of tensors.

    whichlora rehearse --no-smallest --no-store --gpu l40s -- python benchmarks/host_shares.py

The libraries are real and the null device computes nothing, so processor time is the host's alone. Prints the least of
several rounds, in launches of modules that run without autograd: the constants of whichlora/rehearse/lanes.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import peft
import torch
import transformers

BATCH, TOKENS, ROUNDS = 4, 220, 12
SHAPE = {
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 12,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
}


def adapted() -> Any:
    """Return a Llama with adapters on all linear layers."""
    config: Any = transformers.LlamaConfig(**SHAPE)  # type: ignore[arg-type]
    with torch.device("cuda"):
        model: Any = transformers.AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, dtype=torch.bfloat16
        )
    return peft.get_peft_model(model, peft.LoraConfig(r=32, target_modules="all-linear", task_type="CAUSAL_LM"))


class Host:
    """Processor time and launches of each part of a step, the least over rounds."""

    def __init__(self, control: Any) -> None:
        self.launches: Callable[[], int] = control.launches
        self.seen: dict[str, tuple[float, int]] = {}

    def take(self, name: str, work: Callable[[], Any]) -> Any:
        """Run a part and keep what it took."""
        start_s, start = time.process_time(), self.launches()
        result = work()
        taken = time.process_time() - start_s, self.launches() - start
        self.seen[name] = min(taken, self.seen.get(name, taken))
        return result

    def a_launch_s(self, name: str, count: int | None = None) -> float:
        """Return seconds a launch, or a `count` of something else."""
        seconds, launches = self.seen[name]
        return seconds / (count or launches)


def main() -> None:
    """Run rounds of a step and print."""
    from whichlora_null import control  # type: ignore[import-not-found]

    torch.set_num_threads(1)
    model, host = adapted(), Host(control)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    ids = torch.zeros(BATCH, TOKENS, dtype=torch.long, device="cuda")
    mask = torch.ones_like(ids)
    mask[0, -1] = 0
    inputs: Mapping[str, Any] = {"input_ids": ids, "attention_mask": mask, "labels": ids}
    for _ in range(ROUNDS):
        with torch.inference_mode():
            host.take("modules", lambda: model(**inputs))
        loss = host.take("modules that record", lambda: model(**inputs)).loss
        host.take("backward", loss.backward)
        host.take("clip", lambda: torch.nn.utils.clip_grad_norm_(parameters, 1.0))
        host.take("optimizer", optimizer.step)
        with torch.no_grad():
            host.take("loop", lambda: [p.grad.mul_(0.9).addcmul_(p, p).add_(p * p.abs()) for p in parameters])
        optimizer.zero_grad()
    unit_s = host.a_launch_s("modules")
    print(f"a launch of modules without autograd takes {unit_s * 1e6:.1f} us here")
    for name in ("modules that record", "backward", "loop"):
        print(f"{name}: {host.a_launch_s(name) / unit_s:.2f} times that")
    count = len(parameters)
    print(f"clipping, a gradient: {host.a_launch_s('clip', count) / unit_s:.2f}, {host.seen['clip'][1]} launches")
    print(
        f"AdamW, a parameter: {host.a_launch_s('optimizer', count) / unit_s:.2f}, {host.seen['optimizer'][1]} launches"
    )


if __name__ == "__main__":
    main()
