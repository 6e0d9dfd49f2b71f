"""`whichlora verify`: the rehearsed step for real, with its time, beside what was predicted."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import click

from whichlora_estimators.errors import BadValue
from whichlora_estimators.units import format_bytes, format_seconds
from whichlora_estimators.workload import Workload

from ..api import SCHEMA
from ..plan import read_plan
from ..rehearse import UNLIMITED
from ..rehearse.adapters import METHODS
from ..rehearse.rehearsals import TIMEOUT_S
from ..verify import (
    ON,
    STEPS,
    WARMUP,
    Options,
    PlanVerification,
    Verification,
    answer,
    find_place,
    verify_plan,
)
from ..verify import verify as verify_workloads
from ..verify.verifications import check_on
from .cluster import cluster_options, echo_sweeps, sweeps
from .estimate import combinations, estimate, setup_text
from .rehearse import SHARED, check_forms, parsed, workload_name
from .results import results_store, unanswered
from .tables import table

_PLAN = "plan.json"


@click.command()
@click.argument("models", nargs=-1, metavar="MODEL…|PLAN.json")
@click.option("--on", type=click.Choice(ON), default="auto", show_default=True, help="auto: the card, or an error.")
@click.option("--gpu", help="The card that the null device plays, for --on null.")
@click.option(
    "--method", "methods", multiple=True, default=["lora"], show_default=True, help=f"{', '.join(METHODS)}, qlora, …"
)
@click.option("--workloads", type=click.Path(path_type=Path), help="Run one workload per line of a JSON-lines file.")
@click.option("--steps", type=int, default=STEPS, show_default=True, help="Timed steps, or generations.")
@click.option("--warmup", type=int, default=WARMUP, show_default=True, help="Steps before them that are not timed.")
@cluster_options
@click.option("--timeout", "timeout_s", type=float, default=TIMEOUT_S, show_default=True, help="Seconds a workload.")
@click.option("--store/--no-store", "stored", default=True, show_default=True, help="Keep results, and use kept ones.")
@click.option("--db", type=click.Path(path_type=Path), help="The store (default: $WHICHLORA_DB or the user's).")
@click.option("--again", is_flag=True, help="Run also what the store holds from here.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")
def verify(models: tuple[str, ...], workloads: Path | None, **options: Any) -> None:
    """Run the real training step (or generation) of each MODEL for real: memory and time, beside the prediction.

    On a CUDA card; on the host (--on cpu), for small models; or on a card that is not there (--on null), where the same
    code runs and only memory is known. Weights are random, nothing is downloaded but configs.

    A PLAN.json, or its folder, is what `whichlora pick` writes: its survivors are run, the best first, until one keeps
    the limits. The exit status is then 1 if none does.
    """
    check_forms(models, workloads, options)
    if len(models) == 1 and workloads is None and _is_plan(models[0]):
        _verify_plan(Path(models[0]), options)
    elif workloads is not None:
        _echo_workloads(parsed(workloads, partial(check_on, on=options["on"])), options)
    elif not models:
        raise BadValue("no MODEL given", todo="Example: whichlora verify meta-llama/Llama-3.1-8B --method qlora.")
    else:
        _verify_models(models, options)


verify.params[4:4] = [param for param in estimate.params if param.name in SHARED]


def _is_plan(name: str) -> bool:
    path = Path(name)
    return path.name == _PLAN or (path / _PLAN).is_file() or (path.suffix == ".json" and path.name != "config.json")


def _verify_models(models: tuple[str, ...], options: dict[str, Any]) -> None:
    found: list[Verification] = []
    try:
        for verification in _verifications(list(combinations(models, options)), options["gpu"], options):
            found.append(verification)
    finally:  # after Ctrl-C too, what is done is shown
        if found and options["as_json"]:
            click.echo(json.dumps({"schema": SCHEMA, "verifications": [answer(each) for each in found]}, indent=1))
        elif found:
            click.echo(_table(found))


def _echo_workloads(lines: list[Workload | dict[str, Any]], options: dict[str, Any]) -> None:
    gpu = UNLIMITED if options["on"] == "null" and options["gpu"] is None else options["gpu"]
    if options["cluster"]:
        asked = [line for line in lines if isinstance(line, Workload)]
        echo_sweeps(lines, _on_cluster(asked, gpu, options), as_json=options["as_json"], line=_line)
        return
    found = _verifications([line for line in lines if isinstance(line, Workload)], gpu, options)
    for line in lines:
        shown = line if isinstance(line, dict) else answer(next(found))
        click.echo(json.dumps(shown) if options["as_json"] else _line(shown))


def _on_cluster(asked: list[Workload], gpu: str | None, options: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """Verify on a cluster, each task under the options given here."""
    if not options["stored"]:
        raise BadValue("a sweep over a cluster brings back what the store keeps", todo="Leave out --no-store.")
    command = ["verify", f"--on={options['on']}", f"--steps={options['steps']}", f"--warmup={options['warmup']}"]
    command += [f"--timeout={options['timeout_s']}", *([f"--gpu={gpu}"] if gpu else [])]
    command += ["--again"] if options["again"] else []
    return sweeps(command, asked, options)


def _verifications(asked: list[Workload], gpu: str | None, options: dict[str, Any]) -> Iterator[Verification]:
    """Verify, telling of each on stderr as it is done."""
    for workload in asked:
        check_on(workload, options["on"])
    how = _options(options, len(asked))
    place = find_place(options["on"], gpu)
    click.echo(f"on {_where(place.device, place.environment)}", err=True)
    return verify_workloads(asked, on=place, options=how)


def _options(options: dict[str, Any], total: int) -> Options:
    return Options(
        store=results_store(options),
        on_done=_teller(total),
        on_progress=lambda workload, text: click.echo(f"{workload_name(workload)}: {text}", err=True),
        **{name: options[name] for name in ("steps", "warmup", "timeout_s", "again")},
    )


def _teller(total: int) -> Callable[[Verification], None]:
    count = 0

    def tell(verification: Verification) -> None:
        nonlocal count
        count += 1
        known = " (from the store)" if verification.remembered else ""
        name = workload_name(verification.workload)
        click.echo(f"[{count}/{total}] {name}: {_result(verification)}{known}", err=True)

    return tell


def _where(device: str, environment: Any) -> str:
    shown = {"cuda": environment.gpu_name, "null": f"the null device as {environment.gpu_name}"}
    return shown.get(device) or f"the host, {environment.cpu_name or 'a processor without a name'}"


def _result(verification: Verification) -> str:
    if verification.outcome != "ok":
        what = "out of memory" if verification.outcome == "oom" else "failed"
        return f"{what} {verification.measurement.error}".strip()
    parts = [f"{label} {format_bytes(size)}" for label, size in _sizes(verification) if size is not None]
    times = [f"{_LABELS[name]} {format_seconds(value)}" for name, value in verification.typical_s.items()]
    return ", ".join([*parts, *times])


_LABELS = {"step_s": "step", "prefill_s": "prefill", "decode_s_per_token": "a token"}


def _sizes(verification: Verification) -> list[tuple[str, int | None]]:
    measured = verification.measurement
    if measured.device == "cpu":
        return [("process", verification.process_bytes)]
    return [("allocated", measured.allocated_peak_bytes), ("reserved", measured.reserved_peak_bytes)]


def _table(found: list[Verification]) -> str:
    """Show each number beside the formula's: `6.5 GiB x1.020` took 2% more than predicted."""
    headers = ("model", "setup", "batch", "trained", "allocated", "reserved", "process", "time", "a token", "outcome")
    text = table(headers, [_cells(each) for each in found], right=range(2, 9))
    return f"{text}\nx: how many times what the formula predicts" if any(each.compared for each in found) else text


def _cells(verification: Verification) -> list[str]:
    measured, workload = verification.measurement, verification.workload
    trained = "-" if measured.trainable_params is None else f"{measured.trainable_params:,}"
    sizes = {
        "allocated_peak_bytes": measured.allocated_peak_bytes,
        "reserved_peak_bytes": measured.reserved_peak_bytes,
        "process_bytes": verification.process_bytes,
    }
    cells = [workload.model, setup_text(workload), str(workload.batch_size), trained]
    cells += [_beside(verification, name, size, format_bytes) for name, size in sizes.items()]
    times = verification.typical_s
    first = "prefill_s" if workload.phase == "generate" else "step_s"
    cells += [_beside(verification, name, times.get(name), format_seconds) for name in (first, "decode_s_per_token")]
    outcome = {"ok": measured.evidence, "oom": "out of memory"}.get(measured.outcome, "failed")
    return [*cells, outcome]


def _beside(verification: Verification, name: str, value: Any, shown: Callable[[Any], str]) -> str:
    if value is None:
        return "-"
    compared = verification.compared.get(name)
    return shown(value) if compared is None else f"{shown(value)} x{compared.ratio:.3f}"


def _line(shown: dict[str, Any]) -> str:
    if lacking := unanswered(shown):
        return lacking
    sizes = [("allocated", "allocated_peak_bytes"), ("reserved", "reserved_peak_bytes"), ("process", "process_bytes")]
    parts = [f"{format_bytes(shown[key])} {label}" for label, key in sizes if shown[key] is not None]
    parts += [f"{label} {format_seconds(shown[key])}" for key, label in _LABELS.items() if key in shown]
    return f"{shown['id']}: {shown['model']}: {', '.join(parts)}"


# --- plans ---


def _verify_plan(path: Path, options: dict[str, Any]) -> None:
    plan = read_plan(path)
    if not plan.survivors:
        raise BadValue("the plan has no survivor to verify", value=str(path), todo="Loosen its limits and pick anew.")
    place = find_place(options["on"], (options["gpu"] or plan.gpu) if options["on"] == "null" else options["gpu"])
    click.echo(f"on {_where(place.device, place.environment)}", err=True)
    if place.device == "cuda" and place.environment.gpu != plan.gpu.slug:
        click.echo(f"the plan was made for {plan.gpu.name}", err=True)
    found = verify_plan(plan, on=place, options=_options(options, len(plan.survivors) + len(plan.serving)))
    if options["as_json"]:
        click.echo(json.dumps(plan_answer(found), indent=1))
    else:
        click.echo(_plan_text(found))
    if found.best is None:
        sys.exit(1)


def plan_answer(found: PlanVerification) -> dict[str, Any]:
    """Flatten what became of a plan for machines."""
    checked = [
        {
            **answer(each.verification),
            "phase": each.candidate.workload.phase,
            "time_s": each.time_s,
            "rejected": list(each.rejected),
        }
        for each in found.checked
    ]
    return {
        "schema": SCHEMA,
        "best": None if found.best is None else len(checked) - 1,
        "verifications": checked,
        "unchecked": list(found.unchecked),
        "spared": found.spared,
    }


def _plan_text(found: PlanVerification) -> str:
    lines = [_table([each.verification for each in found.checked]), ""]
    for each in found.checked:
        serves = "serving, " if each.candidate.workload.phase == "generate" else ""
        name = workload_name(each.candidate.workload)
        lines.append(f"{serves}{name}: {'; '.join(each.rejected) or 'keeps the limits'}")
    if found.best is None:
        lines.append("No survivor of the plan keeps the limits.")
    else:
        total = "" if found.best.time_s is None else f", {format_seconds(found.best.time_s)} in all"
        evidence = found.best.verification.measurement.evidence
        lines.append(f"Best: {workload_name(found.best.candidate.workload)}{total} ({evidence}).")
    if found.unchecked:
        lines.append(f"Not checked here: {', '.join(found.unchecked)}.")
    lines.append(f"{found.spared} profiling runs spared: survivors that need not be run.")
    return "\n".join(lines)
