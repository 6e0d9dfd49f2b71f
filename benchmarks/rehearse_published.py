"""Rehearse the workloads of published memory measurements once, and keep what was seen.

    PYTHONPATH=.:estimators:profiles_db:calibration python -m benchmarks.rehearse_published [--as-published]
        [--only TEXT] [--stack TEXT] [--jobs N] [--longest N]

Each line that is added to `benchmarks/published_rehearsals.jsonl` is a rehearsal as a measurement: its workload, the card
that the null device played, the versions that ran, the peaks. A workload that is there under the same versions is not
rehearsed again. With `--as-published` Transformers and PEFT are of the versions that the publication names, in
environments of their own; PyTorch and bitsandbytes stay the installed ones unless `--stack` names an environment in full,
which goes with `--only` and the Transformers that were published. `docs/published.md` is written from these lines.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from whichlora.rehearse import Rehearsal
from whichlora.rehearse import rehearse as rehearse_workloads
from whichlora.rehearse.adapters import check
from whichlora.rehearse.stacks import OtherStack, make_stack
from whichlora.rehearse.stored import measurement
from whichlora_estimators.errors import WhichloraError
from whichlora_estimators.workload import Workload
from whichlora_profiles_db import (
    Measurement,
    local_environment,
    measurement_from_json,
    measurement_to_json,
    published,
    published_facts,
    workload_id,
)

SEEN = Path(__file__).with_name("published_rehearsals.jsonl")


def main() -> None:
    """Read the arguments, rehearse what is not yet there, card by card."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="only workloads of a source, model or phase that holds this text")
    parser.add_argument("--as-published", action="store_true", help="under the published Transformers and PEFT")
    parser.add_argument("--stack", default="", help="these releases in place of the published ones (with --only)")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--longest", type=int, default=1000, help="no generation of more tokens than this")
    arguments = parser.parse_args()
    known = {_key(one.environment.gpu, workload_id(one.workload), one.environment.versions) for one in seen()}
    for (gpu, published_text), workloads in wanted(arguments.only, arguments.longest, arguments.as_published).items():
        text = arguments.stack or published_text
        stack = _made(text)
        if text and stack is None:
            continue
        versions = stack.versions if stack else local_environment().versions
        missing = [one for one in workloads if _key(gpu, workload_id(one), versions) not in known]
        if missing:
            run(missing, gpu, stack, arguments.jobs)


def run(workloads: list[Workload], gpu: str, stack: OtherStack | None, jobs: int) -> None:
    """Rehearse and keep, telling of each on stderr."""
    for rehearsal in rehearse_workloads(workloads, gpu, jobs=jobs, timeout_s=1200, on_done=keep, stack=stack):
        what = f"{rehearsal.workload.model} {rehearsal.workload.method} {rehearsal.allocated_peak_bytes}"
        print(gpu, stack.text if stack else "installed", rehearsal.outcome, what, file=sys.stderr)


def _made(text: str) -> OtherStack | None:
    try:
        return make_stack(text, lambda line: print(line, file=sys.stderr)) if text else None
    except WhichloraError as error:
        print(f"no environment: {error}", file=sys.stderr)
        return None


def _key(gpu: str | None, workload: str, versions: Mapping[str, str]) -> tuple[str | None, ...]:
    return gpu, workload, *(versions.get(name) for name in ("transformers", "peft", "torch", "bitsandbytes"))


def seen() -> list[Measurement]:
    """Return the rehearsals that were kept."""
    lines = SEEN.read_text(encoding="utf-8").splitlines() if SEEN.exists() else []
    return [measurement_from_json(json.loads(line)) for line in lines]


def keep(rehearsal: Rehearsal) -> None:
    """Add a rehearsal to the file, host and user left out."""
    if rehearsal.outcome == "failed":
        print(f"failed: {rehearsal.workload.model}: {rehearsal.error}", file=sys.stderr)
        return
    with SEEN.open("a", encoding="utf-8") as file:
        file.write(json.dumps(measurement_to_json(measurement(rehearsal).without_names()), sort_keys=True) + "\n")


def wanted(only: str, longest: int, as_published: bool) -> dict[tuple[str, str], list[Workload]]:
    """Return the workloads of published memory, each once, by card and by what pip is asked for."""
    found: dict[tuple[str, str], dict[str, Workload]] = {}
    for one in judging_memory(published()):
        workload, gpu = rehearsable(one.workload), one.environment.gpu
        stack = stack_text(one.environment.versions) if as_published else ""
        words = f"{one.source} {workload.model} {workload.phase} {workload.method} {stack}"
        try:
            check(workload)
        except WhichloraError as error:
            print(f"not rehearsed: {workload.model}: {error}", file=sys.stderr)
            continue
        short = workload.phase == "train" or workload.decode_len <= longest
        if gpu and only in words and short and (stack or not as_published):
            found.setdefault((gpu, stack), {}).setdefault(workload_id(workload), workload)
    return {key: list(workloads.values()) for key, workloads in found.items()}


def stack_text(versions: Mapping[str, str]) -> str:
    """Return the published Transformers and PEFT as requirements, development versions as the release they became."""
    pairs = [(name, versions[name].partition(".dev")[0]) for name in ("transformers", "peft") if name in versions]
    return ",".join(f"{name}=={version}" for name, version in pairs if "transformers" in versions)


def judging_memory(measurements: Iterable[Measurement]) -> Iterator[Measurement]:
    """Yield the measurements that may judge memory, or methods against each other."""
    for one in measurements:
        if one.outcome == "ok" and {"memory", "memory_relative"} & set(published_facts(one).trusted_for):
            yield one


def rehearsable(workload: Workload) -> Workload:
    """Return a workload as the installed libraries run it: their versions; sdpa where flash-attn would be needed."""
    changes: dict[str, object] = {"versions": {}} if getattr(workload, "versions", None) else {}
    if workload.attention == "flash_attention_2":
        changes["attention"] = "sdpa"
    return workload.with_(**changes)


if __name__ == "__main__":
    main()
