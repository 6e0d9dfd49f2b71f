"""`whichlora rehearse`: the real step on a card that is not there, one row per combination or one line per workload."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from whichlora_estimators.errors import BadValue, WhichloraError
from whichlora_estimators.gpus import Gpu
from whichlora_estimators.stack import NEWEST_STACK, Stack, stack_of
from whichlora_estimators.units import format_bytes
from whichlora_estimators.workload import Workload, workload_from_json

from ..api import SCHEMA
from ..rehearse import CHECKPOINT, CONFIG, UNLIMITED, OtherStack, Rehearsal, answer, find_card, make_stack
from ..rehearse import rehearse as rehearse_workloads
from ..rehearse.adapters import METHODS, check
from ..rehearse.icicle import write_icicle
from ..rehearse.rehearsals import LOADS, TIMEOUT_S
from ..rehearse.stacks import parse_stack
from .breakdowns import check_page, explanation
from .cluster import cluster_options, echo_sweeps, sweeps
from .estimate import combinations, estimate, read_lines, setup_text, tell_notes
from .rehearse_script import rehearse_command
from .rehearse_time import echo_times
from .results import results_store, unanswered
from .setup_options import SETUP_NAMES
from .tables import table

_SCRIPT = "whichlora.script"
INSTALLED = "installed"  # the stack of this environment, beside others
#: What describes a workload is spelled as in `whichlora estimate`.
SHARED = {"quantizations", "ranks", "targets", "batch_sizes", "seq_lens", "precision", "attention", "optimizer"}
SHARED |= {"checkpointing", "dropout", "padded", "generate", "prefill_lens", "decode_len", "all_logits", "offline"}
SHARED |= SETUP_NAMES


class _Command(click.Command):
    """Takes what stands behind `--` as a script's command line."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Keep the script's words away from the options."""
        if "--" in args:
            place = args.index("--")
            ctx.meta[_SCRIPT], args = args[place + 1 :], args[:place]
        return super().parse_args(ctx, args)

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        """Show both forms."""
        return [*super().collect_usage_pieces(ctx), "[-- python train.py ARGS…]"]


@click.command(cls=_Command)
@click.argument("models", nargs=-1, metavar="MODEL…")
@click.option("--gpu", "gpus", multiple=True, help=f"Card, as `whichlora gpus` lists it, or {UNLIMITED}; repeatable.")
@click.option(
    "--method", "methods", multiple=True, default=["lora"], show_default=True, help=f"{', '.join(METHODS)}, qlora, …"
)
@click.option(
    "--workloads", type=click.Path(path_type=Path), help="Rehearse one workload per line of a JSON-lines file."
)
@click.option("--jobs", type=int, help="Processes at a time (default: one a processor).")
@cluster_options
@click.option("--timeout", "timeout_s", type=float, default=TIMEOUT_S, show_default=True, help="Seconds a workload.")
@click.option("--alloc-conf", help="PyTorch's allocator configuration, such as expandable_segments:True.")
@click.option(
    "--routing",
    type=click.Choice(["even", "skewed"]),
    default="even",
    show_default=True,
    help="How a mixture's tokens spread over its experts.",
)
@click.option(
    "--load",
    type=click.Choice(LOADS),
    help="How the model comes to be on the card: from_pretrained of a checkpoint without weights, or made there from its "
    "config. [default: checkpoint; config for --workloads]",
)
@click.option(
    "--stack",
    "stacks",
    multiple=True,
    help='Other versions, as in "torch==2.6.0,transformers==5.8.1", in an environment that pip makes once; '
    f"{INSTALLED} for those of here. Several are compared.",
)
@click.option(
    "--smallest/--no-smallest",
    default=True,
    show_default=True,
    help="A script: find the smallest card that it fits, by up to five more rehearsals.",
)
@click.option(
    "--stand-ins/--no-stand-ins",
    default=True,
    show_default=True,
    help="A script: load models whose weights are not here from checkpoints without weights.",
)
@click.option("--store/--no-store", "stored", default=True, show_default=True, help="Keep results, and use kept ones.")
@click.option("--db", type=click.Path(path_type=Path), help="The store (default: $WHICHLORA_DB or the user's).")
@click.option("--time", "timed", is_flag=True, help="Tell the time that the card would take, not the memory.")
@click.option("--explain", is_flag=True, help="Say where the bytes are at each peak: by component, by source line.")
@click.option("--html", type=click.Path(path_type=Path), help="Write what --explain says as a page to click through.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")
def rehearse(models: tuple[str, ...], gpus: tuple[str, ...], workloads: Path | None, **options: Any) -> None:
    """Run the real training step (or generation) of each MODEL on a GPU that is not there, and see what it takes.

    Nothing is computed or downloaded but configs; PyTorch, Transformers, PEFT and bitsandbytes are the installed ones,
    memory is what their real step takes. A workload file is rehearsed without a memory limit unless --gpu names a card.

    After -- comes any training script's own command line: it runs unmodified on the card that is not there.
    """
    script = click.get_current_context().meta.get(_SCRIPT)
    check_forms(models, workloads, options, script)
    check_page(options["html"])
    if script is not None:
        rehearse_command(script, gpus, options)
    elif workloads is not None and options["timed"]:
        echo_times([line for line in parsed(workloads) if isinstance(line, Workload)], gpus, options)
    elif workloads is not None:
        _echo_workloads(parsed(workloads), gpus, options)
    elif not models or not gpus:
        missing = "MODEL" if not models else "--gpu"
        todo = "Example: whichlora rehearse meta-llama/Llama-3.1-8B --gpu rtx-4090."
        raise BadValue(f"no {missing} given", todo=todo)
    elif options["timed"]:
        echo_times(list(combinations(models, options)), gpus, options)
    else:
        _echo_models(models, gpus, options)


rehearse.params[3:3] = [param for param in estimate.params if param.name in SHARED]


def check_forms(
    models: tuple[str, ...], workloads: Path | None, options: dict[str, Any], script: list[str] | None = None
) -> None:
    """Refuse what would be passed over in silence: two things to run at once, and a sweep of what is no file."""
    forms = {"MODEL": models or None, "--workloads": workloads, "a script behind --": script}
    given = [name for name, value in forms.items() if value is not None]
    if len(given) > 1:
        raise BadValue("more than one thing to run", value=" and ".join(given), todo="Run one after the other.")
    if options["cluster"] and workloads is None:
        todo = "Give a file: --workloads workloads.jsonl."
        raise BadValue("a sweep over a cluster wants --workloads", value=f"--cluster {options['cluster']}", todo=todo)


def _echo_models(models: tuple[str, ...], gpus: tuple[str, ...], options: dict[str, Any]) -> None:
    """Rehearse models on every card under every stack; what is wrong with the last of these is said before the first."""
    for text in options["stacks"]:
        parse_stack(text)
    asked = list(combinations(models, options))
    cards = [find_card(gpu) for gpu in dict.fromkeys(gpus)]
    options["load"] = options["load"] or CHECKPOINT
    found: list[Rehearsal] = []
    told: set[str] = set()
    try:
        for stack in _stacks(options):
            tell_notes(asked, _described(stack), told)
            for card in cards:
                found.extend(_rehearsals(asked, card, options, stack))
    finally:  # after Ctrl-C too, what is done is shown
        if found and options["as_json"]:
            click.echo(json.dumps({"schema": SCHEMA, "rehearsals": [answer(each) for each in found]}, indent=1))
        elif found:
            click.echo(_table(found))
    _explain(found, options)


def _stacks(options: dict[str, Any]) -> Iterator[OtherStack | None]:
    """Yield the environments to rehearse in, None for this one; each is made when its turn comes."""
    for text in options["stacks"] or (INSTALLED,):
        yield None if text == INSTALLED else make_stack(text, lambda line: click.echo(line, err=True))


def _described(stack: OtherStack | None) -> Stack:
    """Return what the formula knows of a stack; of the installed one, of which the formula is, the newest."""
    return NEWEST_STACK if stack is None else stack_of(stack.versions)


def _rehearsals(
    asked: list[Workload], card: Gpu, options: dict[str, Any], stack: OtherStack | None = None
) -> Iterator[Rehearsal]:
    """Rehearse, telling of each on stderr as it is done."""
    count = 0

    def tell(rehearsal: Rehearsal) -> None:
        nonlocal count
        count += 1
        where = f"{card.slug} under {rehearsal.stack}" if rehearsal.stack else card.slug
        click.echo(
            f"[{count}/{len(asked)}] {workload_name(rehearsal.workload)} on {where}: {_result(rehearsal)}", err=True
        )

    settings = {name: options[name] for name in ("jobs", "timeout_s", "alloc_conf", "routing", "load")}
    settings["stack"] = stack
    settings["explain"] = options["explain"] or options["html"] is not None
    return rehearse_workloads(asked, card, store=results_store(options), on_done=tell, **settings)


def workload_name(workload: Workload) -> str:
    """Return a workload's label or, without one, what it runs."""
    return workload.id or f"{workload.model} {setup_text(workload)} b{workload.batch_size}"


def _result(rehearsal: Rehearsal) -> str:
    allocated = rehearsal.allocated_peak_bytes
    if rehearsal.outcome == "ok" and allocated is not None:
        return f"{format_bytes(allocated)} allocated"
    where = f" in {rehearsal.phase}" if rehearsal.phase else ""
    return f"out of memory{where}" if rehearsal.outcome == "oom" else f"failed{where}: {rehearsal.error}"


def _table(found: list[Rehearsal]) -> str:
    headers = ["model", "gpu", "setup", "batch", "trained", "allocated", "reserved", "process", "peak in", "outcome"]
    rows = [_cells(rehearsal) for rehearsal in found]
    if any(rehearsal.managed_peak_bytes for rehearsal in found):
        headers.append("managed")
        rows = [[*row, format_bytes(each.managed_peak_bytes or 0)] for row, each in zip(rows, found, strict=True)]
    if any(rehearsal.stack for rehearsal in found):
        headers += ["stack", "to first"]
        rows = [[*row, each.stack or INSTALLED, _to_first(each, found)] for row, each in zip(rows, found, strict=True)]
    return table(headers, rows, right=(*range(3, 8), *range(10, len(headers))))


def _to_first(rehearsal: Rehearsal, found: list[Rehearsal]) -> str:
    """Return how allocated bytes differ from those under the first stack."""
    first = next(each for each in found if (each.workload, each.gpu) == (rehearsal.workload, rehearsal.gpu))
    if first is rehearsal or not first.allocated_peak_bytes or rehearsal.allocated_peak_bytes is None:
        return "-"
    change = 100 * (rehearsal.allocated_peak_bytes / first.allocated_peak_bytes - 1)
    return f"{round(change, 1) + 0.0:+.1f}%"  # never -0.0


def _cells(rehearsal: Rehearsal) -> list[str]:
    workload = rehearsal.workload
    memory = (rehearsal.allocated_peak_bytes, rehearsal.reserved_peak_bytes, rehearsal.process_bytes)
    trained = "-" if rehearsal.trainable_params is None else f"{rehearsal.trainable_params:,}"
    cells = [workload.model, rehearsal.gpu.slug, setup_text(workload), str(workload.batch_size), trained]
    cells += ["-" if value is None else format_bytes(value) for value in memory]
    outcome = {"ok": "fits", "oom": f"out of memory in {rehearsal.phase}"}
    return [*cells, rehearsal.peak_phase or "-", outcome.get(rehearsal.outcome, "failed")]


def _explain(found: list[Rehearsal], options: dict[str, Any]) -> None:
    """Print where the bytes are at each peak, and write the page, where these were asked for."""
    explained = [(_title(each), each.breakdown) for each in found if each.breakdown]
    if options["explain"] and not options["as_json"]:
        for title, breakdown in explained:
            click.echo(f"\n{title}\n{explanation(breakdown)}")
    if options["html"] is not None:
        write_icicle(explained, options["html"])
        click.echo(f"written: {options['html']}", err=True)


def _title(rehearsal: Rehearsal) -> str:
    return f"{workload_name(rehearsal.workload)} on {rehearsal.gpu.name}: {_result(rehearsal)}, peak in {rehearsal.peak_phase}"


def parsed(path: Path, check: Callable[[Workload], None] = check) -> list[Workload | dict[str, Any]]:
    """Return each line's workload or, where there is none that runs, its answer."""

    def parse(number: int, fields: dict[str, Any]) -> Workload | dict[str, Any]:
        try:
            workload = workload_from_json(fields)
            check(workload)
        except WhichloraError as error:
            return {"id": fields.get("id") or f"workload {number}", "error": str(error)}
        return workload

    return [parse(number, fields) for number, fields in enumerate(read_lines(path), 1)]


def _echo_workloads(lines: list[Workload | dict[str, Any]], gpus: tuple[str, ...], options: dict[str, Any]) -> None:
    if len(gpus) > 1:
        raise BadValue("a workload file is rehearsed on one card", value=", ".join(gpus), todo="Name one with --gpu.")
    if len(options["stacks"]) > 1:
        todo = "Name one with --stack, or rehearse the file once for each."
        raise BadValue("a workload file is rehearsed under one stack", value=", ".join(options["stacks"]), todo=todo)
    asked = [line for line in lines if isinstance(line, Workload)]
    options["load"] = options["load"] or CONFIG
    if options["cluster"]:
        echo_sweeps(lines, _on_cluster(asked, gpus, options), as_json=options["as_json"], line=_line)
        return
    card = find_card(gpus[0] if gpus else UNLIMITED)
    stack = next(_stacks(options))
    tell_notes(asked, _described(stack), set())
    found = _rehearsals(asked, card, options, stack)
    explained = []
    for line in lines:
        rehearsal = next(found) if isinstance(line, Workload) else None
        shown = answer(rehearsal) if rehearsal else line
        click.echo(json.dumps(shown) if options["as_json"] else _line(shown))
        if rehearsal and rehearsal.breakdown:
            explained.append(rehearsal)
    _explain(explained, options)


def _on_cluster(asked: list[Workload], gpus: tuple[str, ...], options: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """Rehearse on a cluster, each task under the options given here."""
    if options["explain"] or options["html"] is not None or not options["stored"]:
        todo = "Leave out --explain, --html and --no-store: what comes back is what the store keeps."
        raise BadValue("a sweep over a cluster brings back measurements only", todo=todo)
    command = ["rehearse", f"--gpu={gpus[0] if gpus else UNLIMITED}", "--jobs=1", f"--timeout={options['timeout_s']}"]
    command += [f"--routing={options['routing']}", f"--load={options['load']}"]
    command += [f"--alloc-conf={options['alloc_conf']}"] if options["alloc_conf"] else []
    command += [f"--stack={stack}" for stack in options["stacks"]]
    return sweeps(command, asked, options)


def _line(shown: Any) -> str:
    if lacking := unanswered(shown):
        return lacking
    allocated, reserved = (format_bytes(shown[f"{counter}_peak_bytes"]) for counter in ("allocated", "reserved"))
    return f"{shown['id']}: {shown['model']}: {allocated} allocated, {reserved} reserved"
