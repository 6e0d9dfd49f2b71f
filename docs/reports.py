"""Make docs/reports.md: earlier reports' figures, by formula and by rehearsal side by side.

`python docs/reports.py` computes the formula's numbers and writes the page from the rehearsals in docs/reports/*.jsonl;
`python docs/reports.py --rehearse` runs those again first (Linux, whichlora[gpu]; a few minutes).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from whichlora_estimators.allocator import CachingAllocator
from whichlora_estimators.gpus import find_gpu
from whichlora_estimators.models import load_model
from whichlora_estimators.stack import NEWEST_STACK, Stack, stack_of
from whichlora_estimators.timeline import count_parameters, lay
from whichlora_estimators.units import GB, GIB, MIB
from whichlora_estimators.workload import Workload

HERE = Path(__file__).parent
REHEARSED = HERE / "reports" / "rehearsed.jsonl"
#: Rehearsed with transformers 4.44.2 and torch 2.6.0, which no environment of today's has; kept as they came.
OLDER = HERE / "reports" / "older.jsonl"
PAGE = HERE / "reports.md"
GPU = "a100-sxm-80gb"

#: What we assume where the paper's own settings were not at hand: model, task, batch, tokens, target tokens, rank.
PAPER = (
    ("roberta-base", "seq-cls", 64, 128, None, 8),
    ("roberta-large", "seq-cls", 64, 128, None, 8),
    ("google-t5/t5-small", "seq2seq", 64, 256, 64, 16),
    ("google-t5/t5-base", "seq2seq", 64, 256, 64, 16),
    ("google-t5/t5-large", "seq2seq", 32, 256, 64, 16),
    ("huggyllama/llama-7b", "causal", 4, 512, None, 64),
)
METHODS = ("full", "lora", "lora-fa")
#: The setting that comes near to what a review of the paper quotes of its Table 4: model, task, precision, batch, tokens,
#: target tokens. Rank, the adapters' dropout and eager attention are the same for all; fp32 but for the largest.
NEAR = (
    ("roberta-base", "seq-cls", "fp32", 64, 128, None),
    ("roberta-large", "seq-cls", "fp32", 64, 128, None),
    ("google-t5/t5-small", "seq2seq", "fp32", 64, 128, 128),
    ("google-t5/t5-base", "seq2seq", "fp32", 64, 128, 128),
    ("google-t5/t5-large", "seq2seq", "fp32", 32, 128, 128),
    ("huggyllama/llama-7b", "causal", "fp16-true", 1, 1024, None),
)
NEAR_RANK, NEAR_DROPOUT = 64, 0.1
#: GB of the paper's Table 4, and of its introduction, as that review quotes them.
QUOTED = {
    ("roberta-large", "lora"): "22.5",
    ("roberta-large", "lora-fa"): "15.7",
    ("google-t5/t5-base", "lora"): "32.1",
    ("google-t5/t5-base", "lora-fa"): "25.3",
    ("huggyllama/llama-7b", "full"): "56 (introduction)",
    ("huggyllama/llama-7b", "lora-fa"): "27.5 (introduction)",
}
RANKS = (1, 4, 16, 64, 128)
LLAMA = "huggyllama/llama-7b"
GEMMA, PREFILL, DECODE = "google/gemma-2b", 128, 8
BATCHES = (1, 2, 4, 8, 16, 32)


def workloads() -> Iterator[Workload]:
    """Yield everything that the page rehearses, each with an id of its own."""
    for setting in NEAR:
        for method in METHODS:
            yield near(setting, method)
    for model, task, batch, tokens, target, rank in PAPER:
        for method in METHODS:
            yield _training(model, task, batch, tokens, target, rank, method)
    for rank in RANKS:
        for method in METHODS[1:]:
            yield _training(LLAMA, "causal", 4, 512, None, rank, method)
    for batch in BATCHES:
        for last_only in (True, False):
            yield generation(batch, last_only=last_only)


def near(setting: tuple[str, str, str, int, int, int | None], method: str) -> Workload:
    """Return a model's step in the setting that comes near to the paper's."""
    model, task, precision, batch, tokens, target = setting
    plain = _training(model, task, batch, tokens, target, NEAR_RANK, method)
    return plain.with_(
        id=f"{model} {method} near",
        precision=precision,
        dropout=0.0 if method == "full" else NEAR_DROPOUT,
        attention="sdpa" if task == "seq2seq" else "eager",
        padded=task == "seq-cls",
    )


def _training(model: str, task: str, batch: int, tokens: int, target: int | None, rank: int, method: str) -> Workload:
    return Workload(
        id=f"{model} {method} r{rank}",
        model=model,
        config=load_model(model, offline=True).config,
        task=task,
        method=method,
        rank=rank,
        batch_size=batch,
        seq_len=tokens,
        target_len=target,
    )


def generation(batch: int, *, last_only: bool) -> Workload:
    """Return Gemma's prompt of 128 tokens and a few tokens of answer."""
    return Workload(
        id=f"{GEMMA} b{batch} {'last' if last_only else 'all'}",
        model=GEMMA,
        config=load_model(GEMMA, offline=True).config,
        phase="generate",
        batch_size=batch,
        prefill_len=PREFILL,
        decode_len=DECODE,
        last_logits_only=last_only,
    )


def rehearse_all() -> None:
    """Rehearse every workload on an A100 and keep what it took, with what is live at two of the peaks."""
    from whichlora.rehearse import rehearse

    asked = {workload.id: workload for workload in workloads()}
    explained = {generation(batch, last_only=False).id for batch in (BATCHES[0], BATCHES[-1])}
    kept = {}
    for explain in (False, True):
        chosen = [w for w in asked.values() if (w.id in explained) is explain]
        for found in rehearse(chosen, find_gpu(GPU), explain=explain, fresh=True):
            kept[found.workload.id] = _kept(found)
    lines = (json.dumps({"id": name, **kept[name]}) for name in asked)
    REHEARSED.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _kept(found: Any) -> dict[str, Any]:
    assert found.outcome == "ok", (found.workload.id, found.error)
    taken = {
        "trainable_params": found.trainable_params,
        "allocated_peak_bytes": found.allocated_peak_bytes,
        "reserved_peak_bytes": found.reserved_peak_bytes,
    }
    if found.breakdown:
        lines = found.breakdown.lines.items()
        taken["lines"] = [[line, size] for (component, line), size in lines if component == "logits and loss"]
    return taken


# The page ----------------------------------------------------------------------------------------------------------


Rows = Mapping[str, Mapping[str, Any]]


def formula_bytes(workload: Workload, stack: Stack = NEWEST_STACK) -> int:
    """Return the allocated peak by formula."""
    return lay(workload, stack=stack).replay(CachingAllocator()).allocated_peak_bytes


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Read rehearsals by id."""
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {line["id"]: line for line in lines}


def page() -> dict[Path, str]:
    """Return the text of the page and of its figures, by file."""
    rehearsed, older = read(REHEARSED), read(OLDER)
    known = {workload.id: workload for workload in workloads()}
    formula = {name: formula_bytes(workload) for name, workload in known.items()}
    paper, figure_paper = lora_fa(known, formula, rehearsed)
    ranks, figure_ranks = by_rank(known, formula, rehearsed)
    gemma, figure_gemma = inference(formula, rehearsed, older)
    template = (HERE / "reports" / "page.md").read_text(encoding="utf-8")
    text = template
    tables = {"NEAR": quoted(formula, rehearsed), "PAPER": paper, "RANKS": ranks, "TERMS": terms(known, rehearsed)}
    for name, table in {**tables, **gemma}.items():
        text = text.replace(f"{{{{{name}}}}}", table)
    assert "{{" not in text, text[text.index("{{") :][:40]
    figures = {"lora-fa.svg": figure_paper, "ranks.svg": figure_ranks, "gemma.svg": figure_gemma}
    return {PAGE: text, **{HERE / "reports" / name: drawn for name, drawn in figures.items()}}


def quoted(formula: Mapping[str, int], rehearsed: Rows) -> str:
    """Return the table of the setting that comes near to the paper's, beside what is quoted of it, in GB."""
    rows = []
    for setting in NEAR:
        model, _, precision, batch, tokens, target = setting
        shape = f"{batch} x {tokens}" + (f" + {target}" if target else "")
        for method in METHODS:
            name = near(setting, method).id
            seen = rehearsed[name]["allocated_peak_bytes"]
            sizes = (f"{seen / GB:.1f}", f"{formula[name] / GB:.1f}", percent(formula[name], seen))
            trained = f"{rehearsed[name]['trainable_params']:,}"
            rows.append(
                (model.rpartition("/")[2], precision, shape, method, trained, QUOTED.get((model, method), "-"), *sizes)
            )
    headers = (
        "model",
        "precision",
        "batch x tokens",
        "method",
        "trained",
        "quoted",
        "rehearsed",
        "formula",
        "difference",
    )
    return table(headers, rows)


def lora_fa(known: Mapping[str, Workload], formula: Mapping[str, int], rehearsed: Rows) -> tuple[str, str]:
    """Return the table and the figure of models and methods."""
    rows, groups = [], []
    for model, _task, batch, tokens, target, rank in PAPER:
        taken = []
        for method in METHODS:
            name = f"{model} {method} r{rank}"
            seen = rehearsed[name]["allocated_peak_bytes"]
            taken.append(seen)
            shape = f"{batch} x {tokens}" + (f" + {target}" if target else "")
            trained = f"{rehearsed[name]['trainable_params']:,}"
            setup = (model.rpartition("/")[2], shape, "-" if method == "full" else str(rank), method, trained)
            rows.append((*setup, gib(seen), gib(formula[name]), percent(formula[name], seen)))
        groups.append((model.rpartition("/")[2], taken))
    headers = ("model", "batch x tokens", "rank", "method", "trained", "rehearsed", "formula", "difference")
    return table(headers, rows), bars("Allocated peak, GiB (rehearsed)", METHODS, groups)


def by_rank(known: Mapping[str, Workload], formula: Mapping[str, int], rehearsed: Rows) -> tuple[str, str]:
    """Return the table and the figure of LLaMA-7B over ranks."""
    rows, groups = [], []
    for rank in RANKS:
        names = [f"{LLAMA} {method} r{rank}" for method in METHODS[1:]]
        seen = [rehearsed[name]["allocated_peak_bytes"] for name in names]
        cells = [cell for name, size in zip(names, seen, strict=True) for cell in (gib(size), gib(formula[name]))]
        rows.append((str(rank), *cells, f"{seen[0] / seen[1]:.2f}"))
        groups.append((f"r {rank}", seen))
    headers = ("rank", "LoRA rehearsed", "LoRA formula", "LoRA-FA rehearsed", "LoRA-FA formula", "ratio")
    return table(headers, rows), bars("LLaMA-7B, 4 x 512 tokens: allocated peak, GiB", METHODS[1:], groups)


def terms(known: Mapping[str, Workload], rehearsed: Rows) -> str:
    """Compare what freezing A saves of LLaMA-7B with the classical term and with what PEFT keeps."""
    rows = []
    for rank in RANKS:
        lora, frozen = (f"{LLAMA} {method} r{rank}" for method in METHODS[1:])
        saved = rehearsed[lora]["allocated_peak_bytes"] - rehearsed[frozen]["allocated_peak_bytes"]
        workload = known[lora]
        config = workload.config
        tokens, layers, width = (
            workload.batch_size * workload.seq_len,
            config["num_hidden_layers"],
            config["hidden_size"],
        )
        classical = 14 * tokens * width * layers
        each = 2 * tokens * layers * (6 * width + config["intermediate_size"])
        inputs = 2 * each
        state = 8 * (rehearsed[lora]["trainable_params"] - rehearsed[frozen]["trainable_params"])
        rows.append((str(rank), *(gib(size) for size in (saved, classical, each, inputs, state, inputs + state))))
    headers = ("rank", "saved, rehearsed", "14 b s d L", "2 b s d a layer", "4 b s d a layer", "AdamW of A", "both")
    return table(headers, rows)


def inference(formula: Mapping[str, int], rehearsed: Rows, older: Rows) -> tuple[dict[str, str], str]:
    """Return tables and figure of Gemma's generation over batches."""
    rows, old_rows, groups = [], [], []
    vocab = load_model(GEMMA, offline=True).config["vocab_size"]
    for batch in BATCHES:
        last, everything = (generation(batch, last_only=kept).id for kept in (True, False))
        seen = [rehearsed[name]["allocated_peak_bytes"] for name in (last, everything)]
        chunk = batch * PREFILL * vocab * 2
        cells = [
            cell
            for name, size in zip((last, everything), seen, strict=True)
            for cell in (gib(size), gib(formula[name]))
        ]
        rows.append((str(batch), gib(weights_and_cache_bytes(batch)), *cells, f"{chunk / MIB:,.1f} MiB"))
        then = older[everything]
        stack = stack_of(then["versions"])
        by_formula = formula_bytes(generation(batch, last_only=False), stack)
        old = then["allocated_peak_bytes"]
        groups.append((f"batch {batch}", [seen[0], seen[1], old]))
        old_rows.append(
            (str(batch), gib(old), gib(by_formula), percent(by_formula, old), f"{3 * chunk / MIB:,.1f} MiB")
        )
    explained = []
    for batch in (BATCHES[0], BATCHES[-1]):
        for line, size in rehearsed[generation(batch, last_only=False).id]["lines"]:
            explained.append((str(batch), f"`{line}`", f"{size:,}", f"{size / MIB:,.1f} MiB"))
    headers = (
        "batch",
        "weights and cache",
        "last, rehearsed",
        "last, formula",
        "all, rehearsed",
        "all, formula",
        "logits",
    )
    old_headers = ("batch", "rehearsed", "formula", "difference", "logits and their fp32 copy")
    tables = {
        "GEMMA": table(headers, rows),
        "OLDER": table(old_headers, old_rows),
        "LINES": table(("batch", "source line", "bytes", ""), explained),
    }
    kinds = ("last position's logits", "all logits", "all logits, transformers 4.44.2")
    return tables, bars("Gemma-2b, 128 tokens of prompt: allocated peak, GiB", kinds, groups)


def weights_and_cache_bytes(batch: int) -> int:
    """Return what a first prediction counts: weights and the keys and values of all tokens, in 16 bit."""
    config = load_model(GEMMA, offline=True).config
    width = config["num_key_value_heads"] * config["head_dim"]
    cache = 2 * batch * (PREFILL + DECODE) * config["num_hidden_layers"] * width
    return 2 * (count_parameters(config) + cache)


def gib(size: float) -> str:
    """Write bytes in GiB."""
    return f"{size / GIB:.2f}"


def percent(found: float, seen: float) -> str:
    """Write a difference."""
    return f"{100 * (found / seen - 1):+.2f}%"


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a table in Markdown."""
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


#: Of the figures, in pixels and by hue.
_BAR, _GAP, _HEIGHT, _TOP, _LEFT = 22, 18, 220, 46, 44
_COLOURS = ("#8a8f98", "#2f6fb0", "#e08a2c")


def bars(title: str, kinds: Sequence[str], groups: Sequence[tuple[str, Sequence[int]]]) -> str:
    """Draw groups of bars, as heights in GiB, as an SVG."""
    highest = max(size for _, sizes in groups for size in sizes) / GIB
    group_px = len(kinds) * _BAR + _GAP
    width = _LEFT + max(len(groups) * group_px, 190 * len(kinds)) + _GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{_HEIGHT + _TOP + 40}"'
        ' font-family="sans-serif" font-size="11">',
        f'<text x="{_LEFT}" y="16" font-size="13">{title}</text>',
    ]
    for place, kind in enumerate(kinds):
        x = _LEFT + 190 * place
        parts.append(f'<rect x="{x}" y="24" width="10" height="10" fill="{_COLOURS[place]}"/>')
        parts.append(f'<text x="{x + 15}" y="33">{kind}</text>')
    for number, (name, sizes) in enumerate(groups):
        x = _LEFT + number * group_px
        for place, size in enumerate(sizes):
            height = _HEIGHT * size / GIB / highest
            top = _TOP + _HEIGHT - height
            left = x + place * _BAR
            parts.append(
                f'<rect x="{left}" y="{top:.1f}" width="{_BAR - 2}" height="{height:.1f}" fill="{_COLOURS[place]}"/>'
            )
            parts.append(
                f'<text x="{left + _BAR / 2 - 1}" y="{top - 2:.1f}" text-anchor="middle" font-size="8">{size / GIB:.1f}</text>'
            )
        parts.append(
            f'<text x="{x + (group_px - _GAP) / 2}" y="{_TOP + _HEIGHT + 14}" text-anchor="middle">{name}</text>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> int:
    """Write the page, or say what of it is not current."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rehearse", action="store_true", help="run the rehearsals again first")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a file is not current")
    asked = parser.parse_args()
    if asked.rehearse:
        rehearse_all()
    made = page()
    stale = [path for path, text in made.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        sys.stderr.write(f"{'not current' if asked.check else 'written'}: {path.name}\n")
        if not asked.check:
            path.write_text(made[path], encoding="utf-8")
    return int(asked.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
