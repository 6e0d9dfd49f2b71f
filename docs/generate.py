"""Write the parts of the docs that state facts: help texts, methods, architectures, models, GPUs, accuracy.

usage: python docs/generate.py [--check]

With --check nothing is written; the exit status is 1 where a file is not current.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from whichlora.cli import COMMANDS, main
from whichlora_estimators.families import all_families
from whichlora_estimators.gpus import all_gpus
from whichlora_estimators.methods import all_methods
from whichlora_estimators.models import all_models
from whichlora_estimators.optimizers import OPTIMIZERS
from whichlora_estimators.quantization import QUANTIZATIONS
from whichlora_estimators.units import format_bytes

DOCS = Path(__file__).parent
BENCHMARKS = DOCS.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
HEAD = "<!-- written by docs/generate.py: do not edit -->\n"


def command_line() -> str:
    """Every command's help."""
    context = click.Context(main, info_name="whichlora", max_content_width=100, terminal_width=100)
    parts = ["# Command line", f"```\n{main.get_help(context)}\n```"]
    for name in COMMANDS:
        parts += _helps(main, name, context)
    return "\n\n".join(parts)


def _helps(group: click.Group, name: str, context: click.Context) -> list[str]:
    """Lay out the help of a command, and of its commands where it has some."""
    command = group.get_command(context, name)
    assert command is not None
    own = click.Context(command, info_name=name, parent=context, max_content_width=100, terminal_width=100)
    parts = [f"## {own.command_path}\n\n```\n{command.get_help(own)}\n```"]
    if isinstance(command, click.Group):
        for inner in command.list_commands(own):
            parts += _helps(command, inner, own)
    return parts


def known() -> str:
    """Tables of what is known."""
    methods = _table(("method", "what it is"), [(m.name, m.summary) for m in all_methods().values()])
    families = _table(
        ("model_type", "tasks", "PEFT's default targets"),
        [(name, ", ".join(f.tasks), ", ".join(f.default_targets)) for name, f in sorted(all_families().items())],
    )
    models = _table(
        ("model", "architecture", "parameters"),
        [(m.name, m.family, f"{m.parameters:,}" if m.parameters else "?") for m in all_models()],
    )
    gpus = _table(
        ("gpu", "name", "compute capability", "memory as PyTorch sees it", "bandwidth", "source"),
        [
            (
                g.slug,
                g.name,
                "{}.{}".format(*g.compute_capability),
                f"{format_bytes(g.total_bytes)} ({g.memory_basis})",
                f"{g.hbm_bytes_per_s / 1e9:.0f} GB/s",
                g.source,
            )
            for g in all_gpus()
        ],
    )
    parts = [
        "# What is known",
        f"## Methods\n\n{methods}",
        f"## Optimizers\n\n{', '.join(sorted(OPTIMIZERS))}",
        f"## Quantizations\n\n{', '.join(QUANTIZATIONS)}",
        f"## Architectures with a recipe\n\n{families}",
        f"## Bundled models\n\n{models}",
        f"## GPUs\n\n{gpus}",
    ]
    return "\n\n".join(parts)


def accuracy() -> str:
    """Error against rehearsals: of the grid as it was kept, of the workloads that recipes were made with as it is now."""
    from accuracy import compare, summary

    lines = (BENCHMARKS / "rehearsed.jsonl").read_text(encoding="utf-8").splitlines()
    cases, refused = compare([json.loads(line) for line in lines], "a100-sxm-80gb")
    text = (
        "The recipes were developed against these workloads (`benchmarks/rehearsed.jsonl`), so this is the error of the\n"
        "formulas on what they were checked with. They were rehearsed one after the other in a process that had trained\n"
        "before, so a generation there has a cuBLAS workspace (8.1 MiB) more than in a process of its own, which is what\n"
        "is estimated. Quantised layers were made in place instead of loaded; where that differs (GPT-2, whose Conv1D\n"
        "layers only loading quantises) there is no line."
    )
    found = summary(cases, refused)
    return "\n\n".join(
        [
            "# Accuracy",
            "Estimated peaks of memory against rehearsals: the real PyTorch 2.14.1, Transformers 5.23.0, PEFT 0.21.2 and\n"
            "bitsandbytes 0.50.2 with the real caching allocator, on a CUDA runtime that computes nothing.\n"
            "`benchmarks/accuracy.py FILE` prints all of this for any file of workloads with their `truth`.",
            *_grid(),
            f"## Workloads that the recipes were made with\n\n{text}\n\n{_told(found)}",
            _errors(found),
            _refusals(refused),
        ]
    )


def _grid() -> list[str]:
    """Lay out what `accuracy.py --keep` found on the grid; SystemExit where the grid has changed since."""
    from accuracy import digest, read_text

    name = "grid_accuracy.json"
    found = json.loads((BENCHMARKS / name).read_text(encoding="utf-8"))
    if digest(read_text(BENCHMARKS / found["source"]).splitlines()) != found["rows_sha256"]:
        command = f"python benchmarks/accuracy.py benchmarks/{found['source']} --keep benchmarks/{name}"
        raise SystemExit(f"benchmarks/{found['source']} is not what {name} tells of: {command}")
    text = (
        "`benchmarks/make_grid.py` drew workloads at random over all families, methods and setups and rehearsed each as a\n"
        "process of its own: `grid` everything by chance, `parts` those that adapt embeddings, output heads, single\n"
        "tokens, numbered layers, all but excluded modules, and ranks above a layer's width, `odd` small models that nobody\n"
        "published, with every switch of their configs thrown by chance. Where an estimate was off, the recipe was mended,\n"
        "so this is no held-out error either. The first look at 309 odd workloads more (`make_grid.py --odd 350 --seed 3`;\n"
        "the other 41 the libraries refuse) was one: none refused, trainable parameters equal on all, allocated 0.02% at\n"
        "the 95th percentile and 0.59% at worst, reserved 0.04% and 4.0% (one segment of 2 MiB more or less). The table is\n"
        "what `benchmarks/accuracy.py --keep` found."
    )
    worst = [f"The ten farthest off, {name}:\n\n{_worst(found['worst'][name])}" for name in ("allocated", "reserved")]
    return [f"## The grid\n\n{text}\n\n{_told(found)}", _errors(found), *worst, _refusals(found["refused"])]


def _told(found: dict[str, Any]) -> str:
    count, refused = found["lines"], len(found["refused"])
    equal = found["trainable_equal"]
    return f"{count} of {count + refused} workloads are predicted, {refused} refused; trainable parameters are equal on {equal}."


def _errors(found: dict[str, Any]) -> str:
    rows = [("all", str(found["lines"]), *_percent(found["allocated"]), *_percent(found["reserved"]))]
    for row in found["by"]:
        key, value = next(iter(row.items()))
        reserved = _percent(row["reserved"]) if "reserved" in row else ("", "", "")
        rows.append((f"{key} {value}", str(row["lines"]), *_percent(row["allocated"]), *reserved))
    errors = ("median", "95th percentile", "worst")
    return _table(
        ("workloads", "lines", *(f"{kind}, {name}" for kind in ("allocated", "reserved") for name in errors)), rows
    )


def _worst(lines: list[dict[str, Any]]) -> str:
    keys = ("family", "method", "quantization", "phase", "precision")
    rows = [(line["id"], f"{100 * line['error']:+.2f}%", *(line[key] for key in keys)) for line in lines]
    return _table(("workload", "error", *keys), rows)


def _refusals(refused: list[str]) -> str:
    return "Refused:\n\n" + "\n".join(f"- {reason}" for reason in refused) if refused else "None is refused."


def _percent(errors: dict[str, float]) -> tuple[str, ...]:
    return tuple(f"{100 * errors[name]:.2f}%" for name in ("median", "p95", "worst"))


def _table(headers: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [headers, tuple("---" for _ in headers), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


PAGES = {"cli.md": command_line, "known.md": known, "accuracy.md": accuracy}


def run(check: bool) -> int:
    """Write every page, or compare it; return the exit status."""
    stale = []
    for name, make in PAGES.items():
        path, text = DOCS / name, HEAD + make() + "\n"
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(name)
        if not check:
            path.write_text(text, encoding="utf-8")
    for name in stale:
        sys.stderr.write(f"docs/{name} {'is not current: run `make docs`' if check else 'written'}\n")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(run("--check" in sys.argv[1:]))
