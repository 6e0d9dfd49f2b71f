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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.roofline_cases import MODELS, Case, liger_cases, published_cases, vidur_cases
from whichlora_estimators.roofline import Roofline, RooflineConstants
from whichlora_estimators.tape import Kernel
from whichlora_estimators.tensor import WAITS

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
    "vector_bandwidth_share": (0.15, 0.95, 0.5),
    "product_start_s": (1e-6, 1e-5, 5e-6),
    "pointwise_bandwidth_share": (0.4, 0.95, 0.7),
    "pointwise_floor_s": (1e-6, 5e-6, 2e-6),
    "cached_share": (0.1, 1.0, 0.4),
    "cache_bytes_per_s_per_sm": (5e9, 8e10, 2e10),
    "recording_host_ratio": (1.0, 2.0, 1.35),
}
#: Every host gets its own time per launch; those that ship are means over runs, of servers and of desktops.
HOST_BOUNDS = (3e-6, 4e-5, 1.3e-5)
#: A host's time per launch is known where it decides at least this share of a step.
SHARE_THAT_TELLS = 0.1
#: Log errors beyond this pull no harder.
OUTLIER = 0.3
#: How hard a device constant is held where its search starts, in widths of its bounds: without the one card that tells
#: of it, it stays near there. Of 0, 0.025 and 0.06 the one with the least held-out error.
PRIOR = 0.06
#: Whole steps count as much as all single operators together.
WEIGHT_OF_STEPS = 0.5
#: How the search goes: by which share a constant is moved at first and at last, how many rounds and leaps at most.
FIRST_STEP, LAST_STEP, ROUNDS, MOST_LEAPS = 0.25, 0.004, 60, 6
#: Of vLLM's layers, one time in so many is looked at: their shapes repeat.
EVERY_VIDUR = 43


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """Constants with the mean of the hosts' times, and the hosts."""

    constants: RooflineConstants
    hosts: dict[str, float]

    def telling_cases(self, compiled: Compiled) -> Counter[str]:
        """Count the cases, by host, of whose time the host's launches decide enough to be known."""
        idle = Fit(constants=self.constants, hosts=dict.fromkeys(self.hosts, 0.0))
        gains = compiled.log_errors(self) - compiled.log_errors(idle)
        return Counter(c.host for c, gain in zip(compiled.cases, gains, strict=True) if gain > SHARE_THAT_TELLS)

    def settled(self, compiled: Compiled) -> Fit:
        """Return the fit with the hosts that are known, and their means among the constants."""
        telling = self.telling_cases(compiled)
        desktops = {case.host for case in compiled.cases if case.gpu.segment == "consumer"}
        seconds = {host: self.hosts[host] for host in telling}
        server_s = _mean({h: s for h, s in seconds.items() if h not in desktops}, telling) or HOST_BOUNDS[2]
        desktop_s = _mean({h: s for h, s in seconds.items() if h in desktops}, telling) or server_s
        constants = replace(self.constants, host_s_per_launch=server_s, desktop_host_s_per_launch=desktop_s)
        return Fit(constants=constants, hosts=seconds)


def _mean(seconds: Mapping[str, float], weights: Mapping[str, int]) -> float:
    """Return the geometric mean over cases, 0 without any."""
    cases = sum(weights[host] for host in seconds)
    return math.exp(sum(weights[host] * math.log(s) for host, s in seconds.items()) / cases) if cases else 0.0


class Compiled:
    """Cases with their launches as numbers of distinct kernels, so that one set of constants is tried in a blink."""

    def __init__(self, cases: Sequence[Case]) -> None:
        self.cases = cases
        self.gpus = {case.gpu.slug: case.gpu for case in cases}
        self.distinct: dict[tuple[str, Kernel], int] = {}
        self.lanes = Lanes(cases, self._numbers)
        self.durations: dict[RooflineConstants, Array] = {}
        self.logs = np.log([case.measured_s for case in cases])
        groups = Counter((case.source, case.gpu.slug) for case in cases)
        steps = {(case.source, case.gpu.slug) for case in cases if not case.on_device}
        share = {True: WEIGHT_OF_STEPS / max(1, len(steps))}
        share[False] = (1 - WEIGHT_OF_STEPS) / max(1, len(groups) - len(steps))
        keys = [(case.source, case.gpu.slug) for case in cases]
        self.weights = np.array([share[key in steps] / groups[key] for key in keys])

    def _numbers(self, case: Case, kernels: Sequence[Kernel]) -> list[int]:
        return [self.distinct.setdefault((case.gpu.slug, kernel), len(self.distinct)) for kernel in kernels]

    def durations_s(self, constants: RooflineConstants) -> Array:
        """Return the seconds of the distinct kernels; those of the last constants are remembered."""
        hostless = replace(constants, host_s_per_launch=0, desktop_host_s_per_launch=0, recording_host_ratio=1)
        if hostless not in self.durations:
            rooflines = {slug: Roofline(gpu, constants) for slug, gpu in self.gpus.items()}
            seconds = np.array([rooflines[slug].kernel_s(kernel) for slug, kernel in self.distinct])
            self.durations = {hostless: seconds}
        return self.durations[hostless]

    def log_errors(self, found: Fit) -> Array:
        """Return log(predicted / measured) of every case; a host that is not among the fit's has its mean."""
        constants = found.constants
        launches_s = [
            0.0
            if case.on_device
            else found.hosts.get(case.host, constants.launch_s(case.gpu))
            * (constants.recording_host_ratio if case.recording else 1)
            for case in self.cases
        ]
        return np.asarray(np.log(self.lanes.totals_s(self.durations_s(constants), np.array(launches_s))) - self.logs)

    def loss(self, found: Fit) -> float:
        """Return the mean of Huber's loss of log errors, sources and cards counting alike, and that of the prior."""
        errors = np.abs(self.log_errors(found))
        misfit = np.where(errors < OUTLIER, errors**2 / (2 * OUTLIER), errors - OUTLIER / 2) @ self.weights
        surprise = sum(
            (math.log(getattr(found.constants, name) / start) / math.log(high / low)) ** 2
            for name, (low, high, start) in BOUNDS.items()
        )
        return float(misfit + PRIOR * surprise)


class Lanes:
    """The launches of all cases end to end, cut where a sequence begins and where the host waits for the device."""

    def __init__(self, cases: Sequence[Case], numbers: Callable[[Case, Sequence[Kernel]], list[int]]) -> None:
        launched: list[int] = []
        starts, owners, counts = [], [], []
        for owner, case in enumerate(cases):
            for count, kernels in case.parts:
                waits = [place for place, k in enumerate(kernels, 1) if k.dtype == WAITS and place < len(kernels)]
                starts += [len(launched) + place for place in (0, *waits)]
                owners += [owner] * (1 + len(waits))
                counts += [count] * (1 + len(waits))
                launched += numbers(case, kernels)
        self.launched, self.starts = np.array(launched), np.array(starts)
        self.owners, self.counts, self.cases = np.array(owners), np.array(counts), len(cases)
        self.lengths = np.diff([*starts, len(launched)])
        self.issues = np.arange(1, len(launched) + 1) - np.repeat(self.starts, self.lengths)

    def totals_s(self, durations: Array, launches_s: Array) -> Array:
        """Return the seconds of every case (roofline.lane_times says the same of one sequence)."""
        lane = durations[self.launched]
        before = np.cumsum(lane) - lane
        before -= np.repeat(before[self.starts], self.lengths)
        leads = np.maximum.reduceat(
            self.issues * np.repeat(launches_s[self.owners], self.lengths) - before, self.starts
        )
        pieces = self.counts * (np.add.reduceat(lane, self.starts) + leads)
        return np.asarray(np.bincount(self.owners, weights=pieces, minlength=self.cases))


def fit(cases: Sequence[Case]) -> Fit:
    """Search one constant after the other, then along the line of what a whole round moved (Hooke and Jeeves, 1961).

    A step grows where it helped and shrinks where it did not; the search ends where all of them are small. It starts
    from values between the bounds, not from those that ship, so that a card that is held out has no say in it.
    """
    compiled = Compiled(cases)
    hosts = dict.fromkeys(sorted({case.host for case in cases if not case.on_device}), HOST_BOUNDS[2])
    start = {name: bounds[2] for name, bounds in BOUNDS.items()}
    launch_s = {"host_s_per_launch": HOST_BOUNDS[2], "desktop_host_s_per_launch": HOST_BOUNDS[2]}
    best = Fit(constants=RooflineConstants(**start, **launch_s), hosts=hosts)
    loss, steps = compiled.loss(best), dict.fromkeys([*BOUNDS, *hosts], FIRST_STEP)
    for _ in range(ROUNDS):
        before = best
        for name in steps:
            tries = ((tried, compiled.loss(tried)) for tried in _neighbours(best, name, 1 + steps[name]))
            better = next(((tried, lower) for tried, lower in tries if lower < loss), None)
            best, loss = better or (best, loss)
            steps[name] *= 1.5 if better else 0.5
        for _ in range(MOST_LEAPS):
            leap = _moved(best, {name: _value(best, name) ** 2 / _value(before, name) for name in steps})
            lower = compiled.loss(leap)
            if lower >= loss:
                break
            before, best, loss = best, leap, lower
        if max(steps.values()) < LAST_STEP:
            break
    return best.settled(compiled)


def _neighbours(found: Fit, name: str, factor: float) -> Iterator[Fit]:
    for by in (factor, 1 / factor):
        yield _moved(found, {name: _value(found, name) * by})


def _value(found: Fit, name: str) -> float:
    return float(getattr(found.constants, name) if name in BOUNDS else found.hosts[name])


def _moved(found: Fit, values: Mapping[str, float]) -> Fit:
    """Return a fit with these values, each kept between its bounds."""
    kept = {}
    for name, value in values.items():
        low, high, _start = BOUNDS.get(name, HOST_BOUNDS)
        kept[name] = min(high, max(low, value))
    constants = replace(found.constants, **{name: value for name, value in kept.items() if name in BOUNDS})
    return Fit(constants=constants, hosts=found.hosts | {n: value for n, value in kept.items() if n not in BOUNDS})


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


#: What share of held-out measurements an interval is to hold.
COVERAGE = 0.9


def ratios(held: Sequence[Held]) -> dict[str, list[float]]:
    """Return, for each phase, between which multiples of the prediction 90% of held-out measurements lie."""
    tail = (1 - COVERAGE) / 2
    found = {}
    for phase in ("train", "prefill", "decode"):
        logs = [-one.error for one in held if one.case.phase == phase]
        # quantiles of so many: one rank further out, so that the next measurement lies between with this probability
        further = tail * (1 - 1 / len(logs))
        found[phase] = [float(f"{math.exp(np.quantile(logs, q)):.3g}") for q in (further, 1 - further)]
    return found


def document(
    found: Fit, held: Sequence[Held], lines: Sequence[Mapping[str, Any]], paths: Sequence[Path], cases: Sequence[Case]
) -> dict[str, Any]:
    """Return what data/roofline.json holds."""
    values = asdict(found.constants)
    return {
        "constants": {name: float(f"{value:.4g}") for name, value in values.items()},
        "known_hosts": json.loads(TARGET.read_text(encoding="utf-8"))["known_hosts"],  # by hand
        "hosts_s_per_launch": {host: float(f"{seconds:.3g}") for host, seconds in sorted(found.hosts.items())},
        "fit": {
            "how": "benchmarks/fit_roofline.py: search on Huber's loss of log errors, sources and cards alike, and a prior",
            "date": datetime.date.today().isoformat(),
            "files": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths},
            "cases": len(cases),
            "measured_over_predicted": {"coverage": COVERAGE, "ratios": ratios(held)},
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
        text = json.dumps(document(found, held, lines, arguments.files, cases), indent=1)
        TARGET.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
