"""Write docs/published.md and its charts: the published pack beside rehearsals and estimates.

    PYTHONPATH=.:estimators:profiles_db:calibration python -m benchmarks.published_page [--check]

Rehearsals are not run here: they are read from `benchmarks/published_rehearsals.jsonl`. With --check nothing is
written; the exit status is 1 where a file is not current.
"""

from __future__ import annotations

import json
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.make_published_pack import LEFT_OUT
from benchmarks.published import Compared, asking, base_of, compare, errors, feasibility, grouped
from benchmarks.published_chart import Dot, scatter
from benchmarks.published_questions import Question
from benchmarks.published_reasons import reason, reason_of_ratio
from benchmarks.published_rows import ALLOCATED, RESERVED, source_name
from benchmarks.published_times import FITS
from benchmarks.rehearse_published import rehearsable, seen
from whichlora_estimators.errors import WhichloraError
from whichlora_profiles_db import Measurement, published, workload_id

DOCS = Path(__file__).parent.parent / "docs"
HEAD = "<!-- written by benchmarks/published_page.py: do not edit -->\n"
#: Errors up to this need no explanation.
UNEXPLAINED = 0.02
ASK = asking(None)
#: From prompts of this length on Qwen3 made a mask for sdpa under Transformers 4.51: its config's sliding_window.
MASKED = 4096
#: The fit whose predictions the chart of times shows, where it is there.
DRAWN = "other-cards"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsed:
    """Rehearsals by card and workload: under the libraries installed then, and by the Transformers of other stacks."""

    installed: Mapping[tuple[str, str], Measurement]
    others: Mapping[tuple[str, str, str], Measurement]
    versions: Mapping[str, str]
    stacks: Sequence[Mapping[str, str]]

    def error(self, asked: Question, *, as_published: bool) -> float | None:
        """Return rehearsed over published, less one; None where that was not rehearsed as it ran, or ran out."""
        if as_published and _masked(asked):
            return None
        found = self._found(asked, as_published=as_published)
        value = getattr(found, asked.metric, None) if found and found.outcome == "ok" else None
        return None if value is None else value / asked.measured - 1

    def ran_out(self, asked: Question) -> bool:
        """Whether the rehearsal under the installed libraries ran out of memory."""
        found = self._found(asked, as_published=False)
        return found is not None and found.outcome == "oom"

    def _found(self, asked: Question, *, as_published: bool) -> Measurement | None:
        key = asked.gpu.slug, workload_id(rehearsable(asked.workload))
        if not as_published:
            return self.installed.get(key)
        return self.others.get((key[0], key[1], dict(asked.versions).get("transformers", "").partition(".dev")[0]))


def _masked(asked: Question) -> bool:
    """Say whether sdpa, which is rehearsed, got a mask in the release in question where flash attention got none."""
    return asked.source == "qwen3" and asked.workload.prefill_len >= MASKED


def rehearsals() -> Rehearsed:
    """Read the rehearsals that were kept: the newest Transformers among them is the installed one."""
    kept = seen()
    newest = max((one.environment.versions for one in kept), key=lambda v: _release(v["transformers"]))
    installed, others = {}, {}
    for one in kept:
        gpu, workload = str(one.environment.gpu), workload_id(one.workload)
        others[gpu, workload, one.environment.versions["transformers"]] = one
        if one.environment.versions["transformers"] == newest["transformers"]:
            installed[gpu, workload] = one
    stacks = [one.environment.versions for one in others.values()]
    return Rehearsed(installed=installed, others=others, versions=newest, stacks=stacks)


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:3] if part.isdigit())


# The page --------------------------------------------------------------------------------------------------------------


def page() -> dict[str, str]:
    """Return the files' contents by name."""
    memory, known = compare(ASK, "memory"), rehearsals()
    shown = ("none", "other-cards", "same-card", "all") if FITS.exists() else ("all",)
    times = {fit: compare(ASK, "time", fit) for fit in shown}
    parts = [
        "# Against published measurements",
        _introduction(known),
        f"## The pack\n\n{_contents()}\n\nNot in it, though its source may judge something:\n\n{_left_out()}",
        f"## Memory\n\n{_memory_text(known)}\n\n{_class_table(memory.compared)}\n\n{_memory_table(memory.compared, known)}",
        "![memory, predicted against published](published_memory.svg)",
        f"### Methods relative to each other\n\n{_relative_text()}\n\n{_relative_table(known)}",
        f"### Out of memory\n\n{_feasibility_text()}",
        f"### Row by row\n\n{_rows_text()}\n\n{_rows_table(memory.compared, known)}",
        f"## Time\n\n{_time_text()}\n\n{_time_table(times)}",
        "![time, predicted against published](published_time.svg)",
    ]
    return {
        "published.md": HEAD + "\n\n".join(parts) + "\n",
        "published_memory.svg": _chart(memory.compared, "peak, GB", 1e9),
        "published_time.svg": _chart(times[DRAWN if DRAWN in times else "all"].compared, "seconds", 1.0),
    }


def _introduction(known: Rehearsed) -> str:
    versions = ", ".join(f"{name} {known.versions[name]}" for name in ("torch", "transformers", "peft", "bitsandbytes"))
    older: dict[str, set[str]] = defaultdict(set)
    for one in known.stacks:
        if one["torch"] != known.versions["torch"]:
            older[f"{one['torch']} and {one['bitsandbytes']}"].add(one["transformers"])
    exceptions = "; ".join(f"{both} under Transformers {', '.join(sorted(names))}" for both, names in older.items())
    return (
        "What others measured on real cards and published, beside what whichlora says of the same workloads. A *cell* is\n"
        "one workload over dates and versions of its source; its rows together weigh as one. Errors are predicted over\n"
        "measured, less one. *Formula* is the estimate for the source's versions, without any correction: nothing in it was\n"
        f"fitted on these bytes. *Rehearsal* is `whichlora rehearse`: the real libraries ({versions})\n"
        "on a card that is not there; *rehearsal as published* has the Transformers and PEFT that the source names. PyTorch and\n"
        f"bitsandbytes are then as before, but {exceptions}.\n"
        "Rehearsals run sdpa in the place of the flash-attn library, whose kernel PyTorch has too: those of Qwen3 under\n"
        f"Transformers 4.51 with prompts of {MASKED} tokens or more are left out: sdpa has a mask there, flash attention none."
    )


def _contents() -> str:
    lines: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for one in published():
        counts = lines[source_name(one.source), one.environment.gpu or "-"]
        memory = one.allocated_peak_bytes or one.reserved_peak_bytes
        timed = any(each is not None for each in (one.step, one.prefill, one.decode_per_token))
        flags = {"memory": memory is not None, "process": one.process_bytes is not None, "time": timed}
        counts.update(["all", *(name for name, flag in {**flags, "oom": one.outcome == "oom"}.items() if flag)])
    names = ("all", "memory", "process", "time", "oom")
    rows = [(*key, *(str(counts[name]) for name in names)) for key, counts in sorted(lines.items())]
    return table(("source", "gpu", "measurements", "with peaks", "with process bytes", "with times", "ran out"), rows)


def _left_out() -> str:
    rows = json.loads(LEFT_OUT.read_text(encoding="utf-8"))
    return table(("source", "rows", "why"), [(row["source"], str(row["rows"]), row["reason"]) for row in rows])


def _memory_text(known: Rehearsed) -> str:
    return (
        "Rows that may judge memory in bytes. Publications are up to three years old, and the libraries of then did other\n"
        "things; what of that the formula knows is a table of its own (`whichlora_estimators/stack.py`). Groups that differ\n"
        "are explained row by row below. The first table is of the rows that their source specifies fully (class A), the\n"
        "formula's errors; the second tells methods apart and puts rehearsals beside."
    )


def _class_table(compared: Sequence[Compared]) -> str:
    """Sum up the rows that their source specifies fully (class A), by source and in all."""
    full = [one for one in compared if one.asked.completeness == "A"]
    groups = [({"source": "all", "counter": ""}, full)]
    groups += grouped(full, lambda one: {"source": one.asked.source, "counter": one.asked.metric})
    rows = []
    for name, group in groups:
        summed = errors(group)
        shares = [_percent(summed[key]) for key in ("median_abs_error", "p95_abs_error", "worst_abs_error")]
        counter = name["counter"].removesuffix("_peak_bytes")
        rows.append((name["source"], counter, str(summed["cells"]), str(len(group)), *shares))
    return table(("source", "peak", "cells", "rows", "median", "p95", "worst"), rows)


def _memory_table(compared: Sequence[Compared], known: Rehearsed) -> str:
    rows = []
    by = grouped(compared, lambda one: {"source": one.asked.source, "counter": one.asked.metric, **_method(one)})
    for name, group in by:
        summed = errors(group)
        formula = (str(summed["cells"]), _percent(summed["median_abs_error"]), _percent(summed["worst_abs_error"]))
        rehearsed = [_rehearsed(group, known, as_published=choice) for choice in (False, True)]
        counter = name["counter"].removesuffix("_peak_bytes")
        rows.append((name["source"], counter, name["method"], *formula, *rehearsed[0], *rehearsed[1]))
    headers = ["source", "peak", "method", "cells", "formula: median", "worst", "rehearsed cells", "rehearsal: median"]
    return table([*headers, "worst", "cells rehearsed as published", "median", "worst"], rows)


def _method(one: Compared) -> dict[str, str]:
    workload = one.asked.workload
    if workload.phase == "generate":
        return {"method": "forward" if workload.decode_len == 1 else "generate"}
    stored = "" if workload.quantization == "none" else f" {workload.quantization}"
    family = str(workload.config["model_type"])
    return {"method": f"{workload.method}{stored}{', mixture' if family == 'mixtral' else ''}"}


def _rehearsed(group: Sequence[Compared], known: Rehearsed, *, as_published: bool) -> tuple[str, str, str]:
    found = []
    for one in group:
        if (error := known.error(one.asked, as_published=as_published)) is not None:
            found.append(Compared(asked=one.asked, predicted=(1 + error) * one.asked.measured, weight=one.weight))
    summed = errors(found)
    return str(summed["cells"]), _percent(summed["median_abs_error"]), _percent(summed["worst_abs_error"])


def _relative_text() -> str:
    return (
        "PEFT's comparison on one L40S gives the highest reserved bytes of a whole run. How long its longest batch was is not\n"
        "said: about 4 x 645 tokens, fitted on these same bytes. So only ratios mean something: a method's bytes over those of\n"
        "LoRA at rank 32 under the same versions."
    )


def _relative_table(known: Rehearsed) -> str:
    groups: dict[tuple[object, ...], list[Question]] = defaultdict(list)
    for asked in ASK("memory_relative")[0]:
        groups[asked.gpu.slug, asked.versions].append(asked)
    lines: dict[tuple[str, ...], list[tuple[float, float, float | None, Question]]] = defaultdict(list)
    for group in groups.values():
        base = base_of(group)
        for one in group:
            if base is not None and one is not base:
                lines[_what(one)].append((*_ratio(one, base, known), one))
    rows = []
    for name, ratios in sorted(lines.items()):
        measured, predicted, rehearsed, one = ratios[len(ratios) // 2]
        cells = ("-", "-") if rehearsed is None else (f"{rehearsed:.3f}", _percent(rehearsed / measured - 1))
        error = predicted / measured - 1
        why = reason_of_ratio(one) if abs(error) > UNEXPLAINED else ""
        rows.append((*name, str(len(ratios)), f"{measured:.3f}", f"{predicted:.3f}", _percent(error), *cells, why))
    return table(
        ("gpu", "method", "transformers", "runs", "published", "formula", "error", "rehearsal", "error", "why"), rows
    )


def _what(asked: Question) -> tuple[str, str, str]:
    rank = "" if asked.workload.method in ("full", "p-tuning") else f" r{asked.workload.rank}"
    named = isinstance(asked.workload.targets, tuple)
    targets = f" on {', '.join(asked.workload.targets or ())}" if named else ""
    return asked.gpu.slug, f"{asked.workload.method}{rank}{targets}", dict(asked.versions).get("transformers", "?")


def _ratio(one: Question, base: Question, known: Rehearsed) -> tuple[float, float, float | None]:
    from benchmarks.published_memory import predicted_bytes

    measured = one.measured / base.measured
    both = [predicted_bytes(each.workload, each.gpu, RESERVED, dict(each.versions)) for each in (one, base)]
    of_both = [known.error(each, as_published=False) for each in (one, base)]
    rehearsed = None
    if of_both[0] is not None and of_both[1] is not None:
        rehearsed = measured * (1 + of_both[0]) / (1 + of_both[1])
    return measured, both[0] / both[1], rehearsed


def _feasibility_text() -> str:
    counts = feasibility(ASK)
    return (
        f"{counts['rows']} runs left no metrics, and their source presumes that memory ran out. Of the {counts['mapped']}"
        f" that the formula covers it says for {counts['predicted_not_to_fit']} that they do not fit."
    )


def _rows_text() -> str:
    return (
        "Each line is a workload under one version of Transformers, the median of its runs, and a line more for a run that is\n"
        f"further than {100 * UNEXPLAINED:.0f}% from that. *Why* is given where the formula is as much off."
    )


def _rows_table(compared: Sequence[Compared], known: Rehearsed) -> str:
    by: dict[tuple[str, ...], list[Compared]] = defaultdict(list)
    for one in compared:
        transformers = dict(one.asked.versions).get("transformers", "?")
        by[one.asked.source, _setup(one.asked), transformers, one.asked.metric].append(one)
    rows = []
    lines = [(name, one) for name, group in sorted(by.items()) for one in _told(group)]
    for (source, setup, transformers, metric), one in lines:
        errors_ = [known.error(one.asked, as_published=choice) for choice in (False, True)]
        cells = ["-" if error is None else _signed(error) for error in errors_]
        if known.ran_out(one.asked):
            cells[0] = "out of memory"
        why = reason(one.asked) if abs(one.error) > UNEXPLAINED else ""
        counter = "" if metric == ALLOCATED else f" ({metric.removesuffix('_peak_bytes')})"
        figures = f"{one.asked.measured / 1e9:.2f} GB{counter}"
        rows.append((source, setup, transformers, figures, _signed(one.error), *cells, why))
    headers = ("source", "workload", "transformers", "published", "formula", "rehearsal", "as published", "why")
    return table(headers, rows)


def _told(group: Sequence[Compared]) -> list[Compared]:
    """Return the median of runs of one workload under one version, and those that are far from it."""
    ordered = sorted(group, key=lambda each: each.error)
    median = ordered[len(group) // 2]
    return [median, *(one for one in ordered if abs(one.error - median.error) > UNEXPLAINED)]


def _setup(asked: Question) -> str:
    workload = asked.workload
    model = workload.model.rpartition("/")[2]
    if workload.phase == "generate":
        lengths = f"{workload.prefill_len}+{workload.decode_len - 1}" if workload.decode_len > 1 else "forward of 256"
        return f"{model} {workload.attention} b{workload.batch_size} {lengths}"
    stored = "" if workload.quantization == "none" else f" {workload.quantization}"
    prepared = " prepared" if stored and workload.kbit_preparation else ""
    return (
        f"{model} {workload.method}{stored}{prepared} {workload.precision} b{workload.batch_size} s{workload.seq_len}"
    )


def _time_text() -> str:
    return (
        "The roofline's constants are fitted on times, so it matters which ones: *none* has seen single operators only\n"
        "and no published run; *other cards* no run of the same chip (leave one card out); *same card* also multiplies\n"
        "by what the card's other workloads of that source took over their prediction (leave one workload out); *all* is the\n"
        "shipped fit with that factor of all, this workload's included. The chart shows *other cards*, or all where\n"
        "that was not fitted (`benchmarks/roofline_fits.py`)."
    )


def _time_table(times: Mapping[str, Any]) -> str:
    lines: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for found in times.values():
        groups = grouped(found.compared, _kind_of_time)
        for name, group in [*groups, ({"source": "all", "gpu": "", "of": ""}, list(found.compared))]:
            summed = errors(group)
            line = lines[tuple(name.values())]
            line += [] if line else [str(summed["cells"])]
            line += [_percent(summed["median_abs_error"]), _percent(summed["p95_abs_error"])]
    heads = [f"{fit.replace('-', ' ')}: {kind}" for fit in times for kind in ("median", "p95")]
    return table(("source", "gpu", "time of", "cells", *heads), [(*name, *line) for name, line in lines.items()])


def _kind_of_time(one: Compared) -> dict[str, str]:
    return {"source": one.asked.source, "gpu": one.asked.gpu.slug, "of": one.asked.metric}


def _chart(compared: Sequence[Compared], unit: str, scale: float) -> str:
    dots = [
        Dot(
            group=one.asked.source,
            x=one.asked.measured / scale,
            y=one.predicted / scale,
            label=f"{_setup(one.asked)} on {one.asked.gpu.slug}: {_signed(one.error)}",
        )
        for one in compared
    ]
    return scatter(dots, unit=unit)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * abs(value):.2f}%"


def _signed(value: float) -> str:
    return f"{100 * value:+.2f}%"


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay a table out in Markdown."""
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def main() -> int:
    """Write the files, or compare them."""
    check, stale = "--check" in sys.argv[1:], []
    try:
        made = page()
    except WhichloraError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    for name, text in made.items():
        path = DOCS / name
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(name)
        if not check:
            path.write_text(text, encoding="utf-8")
    for name in stale:
        told = "is not current: run benchmarks/published_page.py" if check else "written"
        sys.stderr.write(f"docs/{name} {told}\n")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
