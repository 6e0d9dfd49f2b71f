"""Draw workloads at random over all families, methods and setups, and rehearse each once: the grid that accuracy is told on.

usage: python benchmarks/make_grid.py OUT.jsonl.gz [--lines N] [--parts N] [--odd N] [--seed S] [--jobs J]

`--parts` lines more adapt parts of models that the others leave alone: embeddings, output heads, single tokens, numbered
layers, all but excluded modules, with ranks above a layer's width among them. `--odd` lines more are of small models that
nobody published (odd_shapes.py). Every process is fresh.

Every line is a workload with its `truth`; what the installed libraries refuse or fail on is left out and told on stderr. A
run that was interrupted goes on where it stopped: lines that OUT has already are not rehearsed again.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from whichlora.rehearse import Rehearsal, rehearse
from whichlora.rehearse.adapters import check
from whichlora_estimators.errors import WhichloraError
from whichlora_estimators.families import all_families
from whichlora_estimators.families.base import Decoder, Model
from whichlora_estimators.methods import all_methods
from whichlora_estimators.models import ModelShape, all_models
from whichlora_estimators.optimizers import OPTIMIZERS
from whichlora_estimators.workload import workload_from_json

sys.path.append(str(Path(__file__).parents[1]))
from benchmarks.odd_shapes import draw_odd

#: Models above this are left out where an architecture has smaller ones.
LARGEST_PARAMETERS = 9e9
#: Tokens of a batch: as many as keep a rehearsal quick to judge by eye, not a limit of anything.
MOST_TOKENS = 16384
LENGTHS = (48, 100, 256, 500, 512, 777, 1024, 2048)


def main() -> None:
    """Draw, rehearse what is missing, append."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path)
    parser.add_argument("--lines", type=int, default=600)
    parser.add_argument("--parts", type=int, default=75)
    parser.add_argument("--odd", type=int, default=0)
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    known = read_lines(arguments.out) if arguments.out.exists() else []
    done = {line["id"] for line in known}
    seed = arguments.seed
    lines = [*draw(arguments.lines, seed), *draw_parts(arguments.parts, seed), *draw_odd(arguments.odd, seed)]
    drawn = [line for line in lines if line["id"] not in done]
    with gzip.open(arguments.out, "at", encoding="utf-8") as out:
        for line, rehearsal in rehearsed(drawn, arguments.jobs):
            if rehearsal.outcome == "ok":
                out.write(json.dumps(line | {"truth": truth(rehearsal)}) + "\n")
                out.flush()
            else:
                print(f"{line['id']}: {rehearsal.error[:200]}", file=sys.stderr)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file of workloads, packed or not."""
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as text:
        return [json.loads(line) for line in text]


def rehearsed(lines: list[dict[str, Any]], jobs: int) -> Iterator[tuple[dict[str, Any], Rehearsal]]:
    """Rehearse what can be, without a memory limit."""
    asked = []
    for line in lines:
        try:
            workload = workload_from_json(line)
            check(workload)
        except WhichloraError as error:
            print(f"{line['id']}: {error}", file=sys.stderr)
            continue
        asked.append((line, workload))
    found = rehearse([workload for _, workload in asked], "unlimited", jobs=jobs, fresh=True)
    return ((line, rehearsal) for (line, _), rehearsal in zip(asked, found, strict=True))


def truth(rehearsal: Rehearsal) -> dict[str, Any]:
    """Return what a rehearsal took."""
    return {
        "trainable_params": rehearsal.trainable_params or 0,
        "model_bytes": rehearsal.model_bytes or rehearsal.weights_bytes,
        "allocated_peak_bytes": rehearsal.allocated_peak_bytes,
        "reserved_peak_bytes": rehearsal.reserved_peak_bytes,
        "phases": {name: peak.allocated_peak_bytes for name, peak in rehearsal.phases.items() if name != "load"},
    }


def draw(count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Yield workloads: families and methods in turn, everything else by chance."""
    random = Random(seed)
    families = sorted(name for name in all_families() if shapes(name))
    methods = sorted(all_methods())
    for index in range(count):
        name = families[index % len(families)]
        line = {"id": f"grid-{index:04d}", **_workload(random, name, methods[(index // 3) % len(methods)])}
        yield {key: value for key, value in line.items() if value is not None}


def draw_parts(count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Yield training workloads that adapt parts of a model, of families in turn."""
    random = Random(f"parts {seed}")
    families = sorted(name for name in all_families() if shapes(name))
    for index in range(count):
        name = families[index % len(families)]
        method = random.choice(("lora", "lora", "dora", "rslora", "lora-fa", "adalora", "vera", "ia3"))
        line = {"phase": "generate"}
        while line["phase"] != "train":
            line = _workload(random, name, method)
        line = {"id": f"parts-{index:04d}", **line, **_part(random, all_families()[name], method)}
        yield {key: value for key, value in line.items() if value is not None}


def _part(random: Random, recipe: type[Model], method: str) -> dict[str, Any]:
    some = [*sorted(recipe.default_targets), *(() if recipe.default_targets else ("o_proj", "q_proj"))]
    decoder = issubclass(recipe, Decoder)
    words = (
        recipe.tokens if issubclass(recipe, Decoder) else random.choice(("word_embeddings", "embed_tokens", "shared"))
    )
    head = recipe.head_name if issubclass(recipe, Decoder) else "lm_head"
    lora = method in ("lora", "dora", "rslora", "lora-fa")
    choices: list[dict[str, Any]] = [{"targets": [*some, head]}, {"targets": [*some, head], "rank": 96}]
    if lora:
        choices += [{"targets": [*some, words]}, {"targets": [words]}, {"targets": [*some, words, head]}]
    if method not in ("vera", "ia3"):
        choices += [{"targets": some, "trainable_tokens": random.choice((1, 8, 300))}]
    if method != "vera":
        choices += [{"exclude_modules": some[:1]}, {"targets": "all-linear", "exclude_modules": some[:1]}]
    if method != "ia3":
        choices += [{"targets": some, "layers_to_transform": sorted(random.sample(range(4), 2))}]
        choices += [{"targets": some, "rank": 6000 if decoder else 1000}]
    return {"rank_pattern": None, "modules_to_save": None, **random.choice(choices)}


def shapes(family: str) -> list[ModelShape]:
    """Return the bundled models of an architecture that are not too large, or its smallest one."""
    known = [shape for shape in all_models() if shape.family == family and shape.parameters]
    small = [shape for shape in known if (shape.parameters or 0) <= LARGEST_PARAMETERS]
    return small or sorted(known, key=lambda shape: shape.parameters or 0)[:1]


def _workload(random: Random, family: str, method: str) -> dict[str, Any]:
    shape, recipe = random.choice(shapes(family)), all_families()[family]
    task = "causal" if "causal" in recipe.tasks and random.random() < 0.85 else random.choice(recipe.tasks)
    shared = {
        "model": shape.name,
        "config": dict(shape.config),
        "task": task,
        "attention": random.choice(("sdpa", "sdpa", "sdpa", "eager")),
    }
    if task == "causal" and random.random() < 0.15:
        return shared | _generation(random)
    return shared | _training(random, shape, recipe, method, task)


def _generation(random: Random) -> dict[str, Any]:
    return {
        "phase": "generate",
        "precision": random.choice(("bf16-true", "bf16-true", "fp16-true", "bf16-mixed", "fp32")),
        "quantization": random.choice(("none", "none", "nf4", "int8")),
        "batch_size": random.choice((1, 1, 2, 8)),
        "prefill_len": random.choice((16, 100, 333, 512, 1000)),
        "decode_len": random.choice((1, 4, 20)),
        "cache": random.choice(("dynamic", "dynamic", "static")),
        "last_logits_only": random.random() < 0.7,
    }


def _training(random: Random, shape: ModelShape, recipe: type[Model], method: str, task: str) -> dict[str, Any]:
    seq_len = random.choice([length for length in LENGTHS if length <= _longest(shape)])
    checkpointing = random.random() < 0.5 and all_methods()[method].allows_checkpointing
    quantization = "none" if method == "full" else random.choice(("none", "none", "none", "nf4", "nf4", "fp4", "int8"))
    precision = random.choice(("bf16-true", "bf16-true", "bf16-mixed", "fp32", "fp16-mixed", "fp16-true"))
    return {
        "phase": "train",
        "method": method,
        "precision": precision if quantization == "none" else random.choice(("bf16-true", "bf16-mixed")),
        "quantization": quantization,
        "double_quantization": random.random() < 0.7,
        "kbit_preparation": random.random() < 0.8,
        "checkpointing": checkpointing,
        "reentrant": checkpointing and random.random() < 0.3,
        "optimizer": random.choice(
            (*(name for name, each in OPTIMIZERS.items() if not each.method), "adamw", "adamw", "adamw-fused")
        ),
        "batch_size": random.choice([size for size in (1, 2, 3, 4, 8, 16) if size * seq_len <= MOST_TOKENS]),
        "seq_len": seq_len,
        "target_len": random.choice((16, 100)) if task == "seq2seq" else None,
        "padded": random.random() < 0.35,
        "accumulation": random.choice((1, 1, 1, 1, 2, 4)),
        "clip_grad_norm": random.choice((None, None, 1.0)),
        **(_adapters(random, recipe, method, task) if method != "full" else {}),
    }


def _longest(shape: ModelShape) -> int:
    keys = ("max_position_embeddings", "n_positions")
    found = next((int(shape.config[key]) for key in keys if shape.config.get(key)), max(LENGTHS))
    return found - 20  # room for virtual tokens, and for RoBERTa's padding positions


def _adapters(random: Random, recipe: type[Model], method: str, task: str) -> dict[str, Any]:
    known = all_methods()[method]
    lists = [None] if recipe.default_targets else []
    some = sorted(recipe.default_targets)[:1] or ["o_proj"]
    pattern = rf".*\.[0-9]*[02468]\..*({'|'.join(some)})"
    return {
        "rank": random.choice((1, 4, 8, 16, 64)),
        "targets": random.choice((*lists, "all-linear", "all-linear", "all-linear", some, pattern)),
        "rank_pattern": {some[0]: 12} if known.has_rank_pattern and random.random() < 0.1 else None,
        "dropout": random.choice((0.0, 0.0, 0.05, 0.1)),
        "bias": random.choice(("none", "none", "none", "all", "lora_only")) if known.has_bias else None,
        "modules_to_save": _saved(random, recipe, task),
    }


def _saved(random: Random, recipe: type[Model], task: str) -> list[str] | None:
    if task != "causal" or not issubclass(recipe, Decoder) or random.random() < 0.85:
        return None
    return random.choice([[recipe.head_name], [recipe.tokens], [recipe.head_name, recipe.tokens]])


if __name__ == "__main__":
    main()
