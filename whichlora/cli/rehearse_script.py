"""`whichlora rehearse -- python train.py`: a script on a card that is not there, and the smallest card that it fits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import click

from whichlora_estimators.errors import BadValue
from whichlora_estimators.gpus import Gpu
from whichlora_estimators.units import format_bytes

from ..api import SCHEMA
from ..rehearse.icicle import write_icicle
from ..rehearse.pool import ended_by
from ..rehearse.script import ScriptRun, comes_from_stdin, rehearse_script, smallest_card
from ..rehearse.script import answer as script_answer
from .breakdowns import check_page, explanation
from .rehearse_time import time_lines
from .tables import table


def rehearse_command(command: list[str], gpus: tuple[str, ...], options: dict[str, Any]) -> NoReturn:
    """Run a script, its output on stderr, then say what it took; end with its exit status."""
    if len(gpus) != 1:
        todo = "Example: whichlora rehearse --gpu rtx-4090 -- python train.py."
        raise BadValue("a script is rehearsed on one card", value=", ".join(gpus), todo=todo)
    if options["stacks"]:
        todo = "Name the Python of that environment: whichlora rehearse --gpu rtx-4090 -- /path/to/bin/python train.py."
        raise BadValue("a script runs in its own environment", value=", ".join(options["stacks"]), todo=todo)
    check_page(options["html"])
    explain = options["explain"] or options["html"] is not None
    settings = {name: options[name] for name in ("alloc_conf", "routing", "stand_ins")}
    timed, stdin = options["timed"], sys.stdin.buffer.read() if comes_from_stdin(command) else None
    run = rehearse_script(command, gpus[0], explain=explain, timed=timed, stdin=stdin, stdout=sys.stderr, **settings)
    searched = options["smallest"] and run.outcome != "failed"
    smallest = _search(run, {**settings, "stdin": stdin or b""}) if searched else None
    if options["as_json"]:
        found = {"smallest_card": smallest.slug if smallest else None} if searched else {}
        click.echo(json.dumps({"schema": SCHEMA, **script_answer(run), **found}, indent=1))
    else:
        click.echo(_text(run))
        if searched:
            click.echo(f"smallest card that it fits: {_card(smallest) if smallest else 'none that we know'}")
        if options["explain"] and run.breakdown:
            click.echo(f"\n{explanation(run.breakdown)}")
    if options["html"] is not None and run.breakdown:
        write_icicle([(" ".join(run.command), run.breakdown)], options["html"])
    sys.exit(run.exit_code if run.exit_code >= 0 else 128 - run.exit_code)  # by a signal: as shells say it


def _search(run: ScriptRun, settings: dict[str, Any]) -> Gpu | None:
    """Look for the smallest card, telling of each that is tried; what the script says is heard once."""

    def tell(gpu: Gpu, seen: ScriptRun | None) -> None:
        outcomes = {"ok": "fits", "oom": "runs out of memory", "failed": "failed, the search ends"}
        click.echo(f"again on {_card(gpu)}: {outcomes[seen.outcome] if seen else '…'}", err=True)

    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return smallest_card(run, on_try=tell, **settings, **quiet)


def _card(gpu: Gpu) -> str:
    return f"{gpu.name} ({gpu.slug}), {format_bytes(gpu.total_bytes)}"


def _text(run: ScriptRun) -> str:
    verdicts = {
        "ok": "fits",
        "oom": "does-not-fit: it ran out of memory",
        "failed": f"failed ({ended_by(run.exit_code)})",
    }
    verdict = "interrupted: this is what it took until then" if run.interrupted else verdicts[run.outcome]
    lines = [f"{run.gpu.name}, {format_bytes(run.gpu.total_bytes)}: {verdict}"]
    for name in ("allocated_peak", "reserved_peak", "process", "managed_peak"):
        size = getattr(run, f"{name}_bytes")
        if size:
            lines.append(f"{name.replace('_', ' ')}: {format_bytes(size)}")
    if run.allocated_peak_bytes is None:
        lines.append("no process that used the card lived to tell what it took")
        if run.exit_code > 0 and not Path(run.command[0]).name.startswith("python"):
            lines.append(f"what it calls python is the first on PATH; whichlora's is {sys.executable}")
    if run.ooms and run.outcome != "oom":
        lines.append(f"it ran out of memory and went on: {run.ooms} times")
    lines += [f"{name}: {text}" for name in ("where", "phase", "error", "missing") if (text := getattr(run, name))]
    lines += [_stand_in(**made) for made in run.stand_ins]
    lines += time_lines(run.times)
    if run.phases:
        peaks = [
            (name, format_bytes(peak.allocated_peak_bytes or 0), format_bytes(peak.reserved_peak_bytes or 0))
            for name, peak in run.phases.items()
        ]
        lines.append(table(("phase", "allocated", "reserved"), peaks, right=(1, 2)))
    return "\n".join(lines)


def _stand_in(*, model: str, error: str = "", **made: str) -> str:
    if error:
        return f"not stood in for: {model}: {error}"
    about = ", about four characters a token: lengths of texts are not the real ones"
    tokenizer = f"{made['tokenizer']}{about if made['tokenizer'] != 'cached' else ''}"
    return f"stood in for: {model}: weights of zeros in {made['dtype']}; tokenizer {tokenizer}"
