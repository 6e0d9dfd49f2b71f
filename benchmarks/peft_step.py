"""Steps of PEFT's MetaMathQA comparison, as anybody's script: times them with CUDA events and prints the mean.

    whichlora rehearse --time --gpu l40s -- python benchmarks/peft_step.py METHOD [--record FILE]

METHOD is one of peft_methods.py: lora, dora, adalora, lora-fa, ia3, full and others. Llama-3.2-3B's shape in bf16, batches
of 4 padded to their longest sample, a step as method_comparison/MetaMathQA/run.py does it. On a card it prints what the
card takes, on the null device under --time what that card would. `--record` keeps what each launch takes the host and the
card, for benchmarks/peft_host.py.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.peft_methods import EXPERIMENTS, Experiment

BATCH = 4
#: Padded lengths: the means of the shortest fifth of all batches, of the next, and so on. PEFT's samples have 209.9 tokens on
#: average, sorted within 80 samples, so that one window of 250 steps in two has 40 more of the longer half: the published
#: tokens of 20 windows tell their standard deviation, 68 by the scatter of windows and 65 by what they alternate by. These
#: are the fifths of a gamma distribution with 70 (99th percentile 456, where the reserved bytes published with an emptied
#: cache, on the line through their mean and their most, say 458).
LENGTHS = (129, 171, 206, 245, 334)
#: AdaLoRA prunes from step 200 on and keeps what it has from 4,500 of 5,000 on: a step of each stage, and its share of the run.
STAGES = {"adalora": ((100, 0.04), (1000, 0.86), (4800, 0.1))}
#: Steps of each length, of which the last one counts: all alike but the very first.
STEPS = 2
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


def _model(experiment: Experiment) -> Any:
    import peft
    import transformers

    config: Any = transformers.LlamaConfig(**SHAPE)  # type: ignore[arg-type]
    with torch.device("cuda"):
        model: Any = transformers.AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, dtype=torch.bfloat16
        )
    if not experiment.config:
        return model
    model = peft.get_peft_model(model, getattr(peft, experiment.config)(task_type="CAUSAL_LM", **experiment.fields))
    for name, parameter in model.named_parameters():
        if "ranknum" in name:  # AdaLoRA's ranks train in PEFT 0.21, and did not in the published runs
            parameter.requires_grad_(False)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert experiment.trained in (None, trained), f"{trained} parameters train, {experiment.trained} did"
    return model


def _optimizer(method: str, model: Any) -> torch.optim.Optimizer:
    if method == "lora-fa":
        from peft.optimizers import create_lorafa_optimizer

        return create_lorafa_optimizer(model=model, r=32, lora_alpha=64, lr=1e-4, weight_decay=0.1)
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.1)


def _step(model: Any, optimizer: torch.optim.Optimizer, tokens: int, at: int) -> None:
    """Train on one batch, which the model takes for step number `at` (0: it does not ask)."""
    lengths = [tokens, tokens - 2, tokens - 4, tokens - 6]
    batch = {
        "input_ids": torch.zeros(BATCH, tokens, dtype=torch.long).to("cuda"),
        "attention_mask": torch.tensor([[1] * n + [0] * (tokens - n) for n in lengths]).to("cuda"),
    }
    batch["labels"] = batch["input_ids"].clone()
    for sample, length in enumerate(lengths):
        batch["labels"][sample, length + 1 :] = -100
    items = batch["attention_mask"].sum().item()
    optimizer.zero_grad()
    output = model(**batch, num_items_in_batch=items)
    output.loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    if at:
        model.base_model.update_and_allocate(at)
    output.loss.item()
    output.loss.item()  # once for the log, once for the progress bar


def main(method: str, record: Path | None = None) -> None:
    """Train and print the mean step."""
    model = _model(EXPERIMENTS[method])
    optimizer = _optimizer(method, model)
    if EXPERIMENTS[method].config:
        with (
            model.disable_adapter()
        ):  # run.py measures the base model first: behind it LoRA-FA's A wants gradients again
            pass
    stages = STAGES.get(method, ((0, 1.0),))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
    recorder = _Recorder() if record else None
    mean_ms = 0.0
    for at, share in stages:
        _step(model, optimizer, LENGTHS[0], at)
        for tokens in LENGTHS:
            for step in range(STEPS):
                if recorder:
                    recorder.begin(tokens=tokens, share=share / len(LENGTHS))
                events[0].record()
                _step(model, optimizer, tokens, at)
                events[1].record()
                torch.cuda.synchronize()
                if recorder:
                    recorder.end(keep=step == STEPS - 1)
            mean_ms += share / len(LENGTHS) * events[0].elapsed_time(events[1])
    if recorder and record:
        record.write_text(json.dumps({"method": method, "steps": recorder.steps}), encoding="utf-8")
    print(f"{method}: {mean_ms:.1f} ms a step, measured {EXPERIMENTS[method].measured_ms}")


class _Recorder:
    """Writes down what is laid on the lanes of a rehearsal's clock: [host, card, starts], and [seconds] of a wait.

    The host's share is in launches of modules without autograd, the card's in seconds without those that a kernel takes to
    start, where `starts` says that it does.
    """

    def __init__(self) -> None:
        import ctypes

        ticking = next(
            m for name, m in sys.modules.items() if name.endswith(".ticking") and getattr(m, "_started", False)
        )
        lanes = ticking._started[0]
        self.issue, self.work, self.takes = lanes.issue, lanes.issue.work, lanes.control.wait_takes
        self.host_s = ctypes.CDLL(None).nullcuda_host_s
        self.host_s.restype = ctypes.c_double
        self.steps: list[dict[str, Any]] = []
        self.events: list[list[float]] = []
        module = sys.modules[type(lanes).__module__]
        self.wait_s, self.start_s = module.WAIT_S, module.START_S
        lanes.issue.lay = self._launches
        lanes.issue.work = lanes.control.work = self._work
        lanes.control.wait_takes = self._wait_takes
        self.reached_s = self.host_s()

    def begin(self, **about: float) -> None:
        self.about, self.events = about, []
        self.reached_s = self.host_s()

    def end(self, *, keep: bool) -> None:
        self._look_for_waits()
        if keep:
            self.steps.append({**self.about, "events": self.events})
        self.events = []

    def _look_for_waits(self) -> None:
        if self.host_s() > self.reached_s + 1e-12:
            self.events.append([self.wait_s])
        self.reached_s = self.host_s()

    def _wait_takes(self, seconds: float) -> None:
        self._look_for_waits()
        self.wait_s = seconds
        self.takes(seconds)

    def _launches(self, kernels: list[Any], share: float) -> None:
        for kernel in kernels:
            starts = bool(kernel.moved_bytes and not kernel.m)
            self._lay(share, self.issue.roofline.kernel_s(kernel), starts=starts)

    def _work(self, host_s: float, card_s: float) -> None:
        self._lay(host_s / self.issue.launch_s, card_s, starts=False)

    def _lay(self, share: float, card_s: float, *, starts: bool) -> None:
        self._look_for_waits()
        self.work(share * self.issue.launch_s, card_s + starts * self.start_s)
        self.events.append([share, card_s, int(starts)])
        self.reached_s = self.host_s()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[3]) if "--record" in sys.argv else None)
