"""Predict published times by the formula as it would be had its constants not been fitted on any run of their chips.

    python -m benchmarks.unseen_times

Writes calibration/whichlora_calibration/data/unseen_times.json, by measurement: what `calibrate` compares published times
with. `benchmarks.make_correction` does the same first. The constants are those of `benchmarks/roofline_fits.json`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.published_times import FITS, constants
from benchmarks.roofline_cases import chip_of
from whichlora_calibration.cases import TIMES, measured
from whichlora_estimators.errors import WhichloraError
from whichlora_estimators.estimate import times_of
from whichlora_estimators.gpus import find_gpu
from whichlora_estimators.stack import stack_of
from whichlora_estimators.timeline import lay
from whichlora_profiles_db import Measurement, published

DATA = Path(__file__).resolve().parents[1] / "calibration/whichlora_calibration/data/unseen_times.json"


def main() -> None:
    """Predict and write."""
    write(published())


def write(measurements: Iterable[Measurement]) -> None:
    """Write the times of these measurements."""
    found = {one.id: unseen(one) for one in measurements if one.outcome == "ok"}
    document = {
        "how": "python -m benchmarks.unseen_times",
        "fits": hashlib.sha256(FITS.read_bytes()).hexdigest(),
        "seconds": {id_: times for id_, times in sorted(found.items()) if times},
    }
    DATA.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def unseen(one: Measurement) -> dict[str, float]:
    """Return seconds of what was measured, by target, as somebody would have forecast them who had only other chips."""
    wanted = [target for target in TIMES if measured(one, target) is not None]
    if not wanted or one.environment.gpu is None:
        return {}
    try:
        seconds = _seconds(one)
    except WhichloraError:
        return {}
    return {target: float(f"{value:.6g}") for target in wanted if (value := seconds[target])}


def _seconds(one: Measurement) -> Mapping[str, Any]:
    gpu = find_gpu(one.environment.gpu or "")
    stack = stack_of(dict(one.environment.versions))
    laid = lay(one.workload, compute_capability=gpu.compute_capability, multiprocessors=gpu.sm_count, stack=stack)
    times = times_of(laid, laid.tape.kernels, gpu, constants=constants("other-cards", chip_of(gpu)))
    return {"step": times.step_s, "prefill": times.prefill_s, "decode": times.decode_s_per_token}


if __name__ == "__main__":
    main()
