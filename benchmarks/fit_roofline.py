"""Fit the constants of the roofline on published times, and print the error on cards that were held out.

    PYTHONPATH=estimators python -m benchmarks.fit_roofline FILE... [--cases] [--write]

Tables are told apart by their columns: times of single operators (layers of vLLM by number of tokens; baselines of
Liger-Kernel's benchmarks), and whole steps (published runs). A JSON file holds shapes of models beside the registry's.
`--write` renews estimators/whichlora_estimators/data/roofline.json.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import hashlib
import json
import math
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.roofline_cases import MODELS, Case, liger_cases, published_cases, vidur_cases
from whichlora_estimators.roofline import Roofline, RooflineConstants
from whichlora_estimators.tape import Kernel

TARGET = Path(__file__).parent.parent / "estimators/whichlora_estimators/data/roofline.json"
Array = npt.NDArray[np.float64]

# Fit ------------------------------------------------------------------------------------------------------------------

#: What a device constant may be, and where its search starts.
BOUNDS: dict[str, tuple[float, float, float]] = {
    "product_flops_share": (0.5, 1.0, 0.8),
    "attention_flops_share": (0.5, 0.73, 0.6),  # what FlashAttention-2's paper measured on an A100
    "flops_per_joule": (3e11, 1e12, 6e11),
    "tile_overhead": (1.0, 16.0, 5.0),
    "wave_rounding": (0.05, 1.0, 0.3),
    "product_bandwidth_share": (0.5, 0.95, 0.8),
    "product_start_s": (1e-6, 1e-5, 5e-6),
    "pointwise_bandwidth_share": (0.4, 0.95, 0.7),
    "pointwise_floor_s": (1e-6, 5e-6, 2e-6),
    "cached_share": (0.1, 1.0, 0.4),
    "cache_speedup": (1.2, 6.0, 2.0),
}
#: Every host gets its own time per launch; the one that ships is their geometric mean.
HOST_BOUNDS = (3e-6, 4e-5, 1.3e-5)
#: A host's time per launch is known where it decides at least this share of a step.
SHARE_THAT_TELLS = 0.1
#: Log errors beyond this pull no harder.
OUTLIER = 0.3
#: Whole steps count as much as all single operators together.
WEIGHT_OF_STEPS = 0.5
ROUNDS = 12
#: Of vLLM's layers, one time in so many is looked at: their shapes repeat.
EVERY_VIDUR = 43


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """Constants with the geometric mean of the hosts' times, and the hosts."""

    constants: RooflineConstants
    hosts: dict[str, float]

    def known_hosts(self, compiled: Compiled) -> dict[str, float]:
        """Return the hosts whose launches decide enough of the time of some step to be known."""
        idle = Fit(constants=self.constants, hosts=dict.fromkeys(self.hosts, 0.0))
        gains = compiled.log_errors(self) - compiled.log_errors(idle)
        telling = {case.host for case, gain in zip(compiled.cases, gains, strict=True) if gain > SHARE_THAT_TELLS}
        return {host: seconds for host, seconds in self.hosts.items() if host in telling}


class Compiled:
    """Cases with their launches as numbers of distinct kernels, so that one set of constants is tried in a blink."""

    def __init__(self, cases: Sequence[Case]) -> None:
        self.cases = cases
        self.gpus = {case.gpu.slug: case.gpu for case in cases}
        self.distinct: dict[tuple[str, Kernel], int] = {}
        self.parts = [[(n, np.array([self._number(c, k) for k in ks])) for n, ks in c.parts] for c in cases]
        self.logs = np.log([case.measured_s for case in cases])
        groups = Counter((case.source, case.gpu.slug) for case in cases)
        steps = {(case.source, case.gpu.slug) for case in cases if not case.on_device}
        share = {True: WEIGHT_OF_STEPS / max(1, len(steps))}
        share[False] = (1 - WEIGHT_OF_STEPS) / max(1, len(groups) - len(steps))
        keys = [(case.source, case.gpu.slug) for case in cases]
        self.weights = np.array([share[key in steps] / groups[key] for key in keys])

    def _number(self, case: Case, kernel: Kernel) -> int:
        return self.distinct.setdefault((case.gpu.slug, kernel), len(self.distinct))

    def log_errors(self, found: Fit) -> Array:
        """Return log(predicted / measured) of every case; a host that is not among the fit's has its mean."""
        rooflines = {slug: Roofline(gpu, found.constants) for slug, gpu in self.gpus.items()}
        durations = np.array([rooflines[slug].kernel_s(kernel) for slug, kernel in self.distinct])
        predicted = []
        for case, parts in zip(self.cases, self.parts, strict=True):
            host_s = 0.0 if case.on_device else found.hosts.get(case.host, found.constants.host_s_per_launch)
            predicted.append(sum(count * _lanes_s(durations[numbers], host_s) for count, numbers in parts))
        return np.asarray(np.log(predicted) - self.logs)

    def loss(self, found: Fit) -> float:
        """Return the mean of Huber's loss of log errors, sources and cards counting alike."""
        errors = np.abs(self.log_errors(found))
        return float(np.where(errors < OUTLIER, errors**2 / (2 * OUTLIER), errors - OUTLIER / 2) @ self.weights)


def _lanes_s(lane: Array, host_s: float) -> float:
    before = np.concatenate(([0.0], np.cumsum(lane)))
    waiting = host_s * np.arange(1, len(lane) + 1) - before[:-1]
    return float(before[-1] + max(0.0, waiting.max()))


def fit(cases: Sequence[Case]) -> Fit:
    """Search one constant after the other, with steps that shrink where they do not help."""
    compiled = Compiled(cases)
    hosts = dict.fromkeys(sorted({case.host for case in cases if not case.on_device}), HOST_BOUNDS[2])
    start = {name: bounds[2] for name, bounds in BOUNDS.items()}
    best = Fit(constants=RooflineConstants(**start, host_s_per_launch=HOST_BOUNDS[2]), hosts=hosts)
    loss, steps = compiled.loss(best), dict.fromkeys([*BOUNDS, *hosts], 0.25)
    for _ in range(ROUNDS):
        for name in steps:
            tries = [(tried, compiled.loss(tried)) for tried in _neighbours(best, name, 1 + steps[name])]
            nearest, lowest = min(tries, key=lambda pair: pair[1])
            if lowest < loss:
                best, loss = nearest, lowest
            else:
                steps[name] /= 2
    known = best.known_hosts(compiled)
    mean_s = statistics.geometric_mean(known.values()) if known else HOST_BOUNDS[2]
    return Fit(constants=replace(best.constants, host_s_per_launch=mean_s), hosts=known)


def _neighbours(found: Fit, name: str, factor: float) -> Iterator[Fit]:
    low, high, _start = BOUNDS.get(name, HOST_BOUNDS)
    for by in (factor, 1 / factor):
        if name in BOUNDS:
            value = min(high, max(low, getattr(found.constants, name) * by))
            yield replace(found, constants=replace(found.constants, **{name: value}))
        else:
            yield replace(found, hosts=found.hosts | {name: min(high, max(low, found.hosts[name] * by))})


# Report ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A case with its log error on a fit without its card: with the mean host, and with its host's time known."""

    case: Case
    error: float
    host_known_error: float


def hold_out_cards(cases: Sequence[Case]) -> list[Held]:
    """Predict the cases of every chip by a fit without them."""
    held = []
    everything = fit(cases)
    for chip in sorted({case.chip for case in cases}):
        own = [case for case in cases if case.chip == chip]
        found = fit([case for case in cases if case.chip != chip])
        compiled = Compiled(own)
        known = replace(found, hosts=everything.hosts)
        pairs = zip(own, compiled.log_errors(replace(found, hosts={})), compiled.log_errors(known), strict=True)
        held += [Held(case=case, error=float(a), host_known_error=float(b)) for case, a, b in pairs]
    return held


def summary(held: Sequence[Held]) -> list[dict[str, Any]]:
    """Return median and 95th percentile of the absolute errors by source and card, then over all whole steps."""
    groups: dict[tuple[str, str], list[Held]] = defaultdict(list)
    for one in held:
        groups[one.case.source, one.case.gpu.slug].append(one)
    lines = [_summarised(source, gpu, group) for (source, gpu), group in sorted(groups.items())]
    steps = [one for one in held if not one.case.on_device]
    groups = {key: group for key, group in groups.items() if not group[0].case.on_device}
    return [*lines, _summarised("all whole steps", "", steps), _median_source(groups.values())]


def _median_source(groups: Iterable[Sequence[Held]]) -> dict[str, Any]:
    """Return the medians of the sources' figures, so that no source counts for more because it has more cases."""
    lines = [_summarised("", "", group) for group in groups]
    figures = [name for name in lines[0] if name.endswith("error")]
    medians = {name: round(statistics.median(line[name] for line in lines), 3) for name in figures}
    return {"source": "median source of steps", "gpu": "", "cases": sum(line["cases"] for line in lines), **medians}


def _summarised(source: str, gpu: str, group: Sequence[Held]) -> dict[str, Any]:
    errors = np.abs(np.expm1([one.error for one in group]))
    known = np.abs(np.expm1([one.host_known_error for one in group]))
    return {
        "source": source,
        "gpu": gpu,
        "cases": len(group),
        "median_abs_error": round(float(np.median(errors)), 3),
        "p95_abs_error": round(float(np.quantile(errors, 0.95)), 3),
        "host_known_median_abs_error": round(float(np.median(known)), 3),
    }


def print_summary(lines: Iterable[Mapping[str, Any]]) -> None:
    """Print a line a source and card."""
    print(f"{'source':28} {'card':18} cases  median    p95  median, host known")
    for line in lines:
        errors = (
            f"{line['median_abs_error']:7.1%} {line['p95_abs_error']:7.1%} {line['host_known_median_abs_error']:7.1%}"
        )
        print(f"{line['source']:28} {line['gpu']:18} {line['cases']:5d} {errors}")


# Command --------------------------------------------------------------------------------------------------------------


def read(paths: Sequence[Path]) -> list[Case]:
    """Read every file by what its columns say it is."""
    cases: list[Case] = []
    for path in paths:
        if path.suffix == ".json":
            MODELS.update(json.loads(path.read_text(encoding="utf-8")))
    for path in paths:
        if path.suffix == ".json":
            continue
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        if "attn_pre_proj_ms" in rows[0]:
            cases += list(vidur_cases(rows))[::EVERY_VIDUR]
        elif "kernel_name" in rows[0]:
            cases += liger_cases(rows)
        else:
            mapped, reasons = published_cases(rows)
            cases += mapped
            for reason, count in reasons.most_common():
                print(f"not mapped, {count} cells of {reason[:150]}", file=sys.stderr)
    return cases


def document(
    found: Fit, lines: Sequence[Mapping[str, Any]], paths: Sequence[Path], cases: Sequence[Case]
) -> dict[str, Any]:
    """Return what data/roofline.json holds."""
    values = asdict(found.constants)
    return {
        "constants": {name: float(f"{value:.4g}") for name, value in values.items()},
        "hosts_s_per_launch": {host: float(f"{seconds:.3g}") for host, seconds in sorted(found.hosts.items())},
        "fit": {
            "how": "benchmarks/fit_roofline.py: search on Huber's loss of log errors, sources and cards alike",
            "date": datetime.date.today().isoformat(),
            "files": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths},
            "cases": len(cases),
            "held_out_by_card": list(lines),
        },
    }


def main() -> None:
    """Read the arguments, fit, hold out, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--write", action="store_true", help="renew data/roofline.json")
    parser.add_argument("--cases", action="store_true", help="print every whole step, held out by card")
    arguments = parser.parse_args()
    cases = read(arguments.files)
    held = hold_out_cards(cases)
    if arguments.cases:
        for one in held:
            if not one.case.on_device:
                where = f"{one.case.gpu.slug:18} {one.case.source:28} {one.case.name:75}"
                print(f"{where} {one.case.measured_s:9.4f} s, predicted {math.exp(one.error):5.2f} times that")
    lines = summary(held)
    print_summary(lines)
    found = fit(cases)
    print(found)
    if arguments.write:
        text = json.dumps(document(found, lines, arguments.files, cases), indent=1)
        TARGET.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
