"""Total fine-tuning time on the host, predicted from five profiled batches, against the real total.

usage: python -m benchmarks.finetune_time [--out figure.html|.svg] [--sizes 32 64 128] [--batch-sizes 1 2 4 8]

A small Llama and a tokenizer are made; the data set is text that comes with Python. For each batch size, five batches are
profiled once, the longest one first, and a line of seconds over padded tokens is fitted to them. The prediction for a data
set is that line summed over its batches, padded as they will be; the real total is a whole training by `whichlora finetune`,
checkpoints and evaluation aside. Prints each pair, their correlation and the errors, and writes a plot.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

PROFILED = 5
_VOCABULARY = 2000


def text_rows(count: int) -> Iterator[dict[str, str]]:
    """Yield passages of 10 to 120 words from Python's own help texts."""
    import random
    from pydoc_data import topics

    words = " ".join(topics.topics.values()).split()
    draw = random.Random(0)
    for _ in range(count):
        start, length = draw.randrange(len(words) - 120), draw.randint(10, 120)
        yield {"text": " ".join(words[start : start + length])}


def save_model(folder: Path) -> None:
    """Save a Llama of four layers with a tokenizer of its own."""
    from pydoc_data import topics

    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=_VOCABULARY, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(list(topics.topics.values()), trainer)
    make: Any = PreTrainedTokenizerFast
    fast = make(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    sizes: Any = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(fast), max_position_embeddings=512, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)


def make_recipe(model: Path, data: Path, batch_size: int) -> Any:
    """Pick with a config of one choice, and return its recipe."""
    from whichlora import config_from_fields, pick
    from whichlora.finetune.recipe import make_recipe
    from whichlora.plan import make_plan

    fields = {
        "gpu": "rtx-4090",
        "stage1_profile": {"model_names": [str(model)], "prefill_length": 32, "tokens_to_generate": 8},
        "stage2_profile": {"batch_size": [batch_size]},
        "methods": ["lora"],
        "seq_len": 256,
        "precision": "fp32",
        "dataset": {"source": str(data), "validation_share": 0},
        "finetune": {"save_steps": 100_000},
    }
    return make_recipe(make_plan(pick(config_from_fields(fields), offline=True)))


def train(recipe: Any, folder: Path) -> list[tuple[int, float]]:
    """Fine-tune and return (padded tokens, seconds) of each step; the first one, which warms up, included."""
    from whichlora.finetune.run import Options, run

    found = run(recipe, folder, Options(on="cpu", offline=True))
    assert found.outcome == "ok", found.error
    lines = map(json.loads, (folder / "log.jsonl").read_text(encoding="utf-8").splitlines())
    return [(line["tokens"], line["seconds"]) for line in lines if "seconds" in line]


def profile(recipe: Any, folder: Path) -> tuple[float, float]:
    """Profile five batches after one that warms up; return seconds a step and seconds a padded token."""
    limited = dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, max_steps=PROFILED + 1))
    steps = train(limited, folder)[1:]
    return fit_line(steps)


def fit_line(steps: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Fit seconds = a + b · tokens with neither below zero; all in b where the line would slope down."""
    tokens, seconds = zip(*steps, strict=True)
    if len(set(tokens)) > 1:
        slope, intercept = statistics.linear_regression(tokens, seconds)
        if slope > 0 and intercept >= 0:
            return intercept, slope
    return 0.0, sum(seconds) / sum(tokens)


def batches(recipe: Any) -> list[int]:
    """Return the padded tokens of every batch of the training, in its order, from the lengths alone."""
    from whichlora.data.samples import load_samples
    from whichlora.data.tokens import find_tokenizer, load_tokenizer
    from whichlora.finetune.examples import Collator, LongestFirst, make_examples

    folder = find_tokenizer(recipe.tokenizer, offline=True)
    assert folder
    tokenizer = load_tokenizer(folder)
    samples = load_samples(recipe.data, config=recipe.workload.config, tokenizer=tokenizer)
    examples = make_examples(samples.train, recipe.data, tokenizer, recipe.workload.seq_len)
    lengths = [len(each["input_ids"]) for each in examples]
    grouped = recipe.data.group_by_length
    order = list(LongestFirst(lengths, first=recipe.micro_batch_size, seed=recipe.training.seed, grouped=grouped))
    collate = Collator(pad_id=0, seq_len=recipe.workload.seq_len)
    size = recipe.micro_batch_size
    groups = (order[start : start + size] for start in range(0, len(order), size))
    return [collate([examples[index] for index in group])["input_ids"].numel() for group in groups]


def main() -> None:
    """Run the sweep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("finetune_time.html"))
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    import torch

    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as name:
        found = list(sweep(Path(name), given.sizes, given.batch_sizes))
    predicted, real = [row[2] for row in found], [row[3] for row in found]
    errors = [abs(p / r - 1) for p, r in zip(predicted, real, strict=True)]
    print(f"correlation {statistics.correlation(predicted, real):.4f}")
    print(f"error: median {statistics.median(errors):.1%}, worst {max(errors):.1%}, of {len(errors)} trainings")
    (chart if given.out.suffix == ".svg" else plot)(found, given.out)
    print(f"wrote {given.out}")


def sweep(folder: Path, sizes: Sequence[int], batch_sizes: Sequence[int]) -> Iterator[tuple[int, int, float, float]]:
    """Yield (samples, batch size, predicted s, real s) for every pair of them."""
    model = folder / "model"
    save_model(model)
    rows = list(text_rows(max(sizes)))
    for batch_size in batch_sizes:
        line = None
        for size in sizes:
            data = folder / f"{size}.jsonl"
            data.write_text("\n".join(map(json.dumps, rows[:size])), encoding="utf-8")
            recipe = make_recipe(model, data, batch_size)
            if line is None:
                line = profile(
                    make_recipe(model, _write_all(folder, rows), batch_size), folder / f"profile-{batch_size}"
                )
            predicted_s = sum(line[0] + line[1] * tokens for tokens in batches(recipe))
            real_s = sum(seconds for _, seconds in train(recipe, folder / f"run-{batch_size}-{size}"))
            print(
                f"{size:5} samples, batch {batch_size}: predicted {predicted_s:7.2f} s, real {real_s:7.2f} s",
                flush=True,
            )
            yield size, batch_size, predicted_s, real_s


def _write_all(folder: Path, rows: Sequence[dict[str, str]]) -> Path:
    path = folder / "all.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def chart(found: Sequence[tuple[int, int, float, float]], path: Path) -> None:
    """Write predicted against real totals for the docs."""
    from benchmarks.published_chart import Dot, scatter

    dots = [
        Dot(group=f"batch size {batch}", x=real_s, y=predicted_s, label=f"{samples} samples, batch size {batch}")
        for samples, batch, predicted_s, real_s in found
    ]
    path.write_text(scatter(dots, unit="s"), encoding="utf-8")


def plot(found: Sequence[tuple[int, int, float, float]], path: Path) -> None:
    """Write predicted against real totals, a series for each batch size."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for batch_size in dict.fromkeys(row[1] for row in found):
        rows = [row for row in found if row[1] == batch_size]
        figure.add_scatter(
            x=[row[3] for row in rows],
            y=[row[2] for row in rows],
            text=[f"{row[0]} samples" for row in rows],
            mode="markers",
            name=f"batch size {batch_size}",
        )
    most = max(max(row[2:]) for row in found)
    figure.add_scatter(x=[0, most], y=[0, most], mode="lines", name="equal")
    figure.update_layout(xaxis_title="real total, s", yaxis_title=f"predicted from {PROFILED} batches, s")
    figure.write_html(path, include_plotlyjs=True)


if __name__ == "__main__":
    main()
