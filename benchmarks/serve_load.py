"""A server under load: many readers while packs come in, beside the same server answering a constant.

    python -m benchmarks.serve_load --readers 200 --writers 10 --seconds 60

Starts `whichlora serve` on this machine's loopback, has readers ask for estimates and writers push packs of their own,
then the readers alone ask for /health. Prints requests a second and the 95th percentile of both, and the ratios, which
are what compares between machines; then counts that nothing was lost or doubled, and exits with 1 where it was.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path

import httpx

from benchmarks.waiting import answers, free_ports, until
from whichlora.serve.tokens import Role, Tokens, tokens_path
from whichlora_estimators.workload import Workload
from whichlora_profiles_db import Environment, Measurement, write_pack

ROWS_A_PACK = 20
MODELS = ("Qwen/Qwen2.5-0.5B", "meta-llama/Llama-3.2-1B", "microsoft/Phi-3-mini-128k-instruct")


@dataclass(slots=True)
class Seen:
    """Times of answers in seconds, answers that were wrong, rows that the server acknowledged."""

    times_s: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    acknowledged: list[str] = field(default_factory=list)


def measured(writer: int, number: int) -> Measurement:
    """Return one of a writer's measurements, each another one."""
    return Measurement(
        workload=Workload(model="example/model", config={"hidden_size": 64}),
        environment=Environment(gpu="rtx-4090", versions={"torch": "2.14.1"}),
        evidence="measured",
        device="cuda",
        outcome="ok",
        measured_at=datetime(2026, 1, 1, tzinfo=timezone.utc) + timedelta(seconds=number),
        allocated_peak_bytes=10**9 + number,
        notes=f"writer {writer}, {number}",
    )


async def read(url: str, path: str, until_s: float, seen: Seen) -> None:
    """Ask one thing after the other."""
    draw = random.Random(id(seen) + len(seen.times_s))
    async with httpx.AsyncClient(base_url=url, timeout=120, trust_env=False, verify=False) as client:
        while time.monotonic() < until_s:
            fields = {"gpu": "rtx-4090", "model": draw.choice(MODELS), "batch_size": draw.choice((1, 2, 4, 8))}
            started = time.perf_counter()
            try:
                answer = await (client.post(path, json=fields) if path == "/v1/estimate" else client.get(path))
            except httpx.HTTPError as error:
                seen.errors.append(f"{path}: {error!r}")
                continue
            seen.times_s.append(time.perf_counter() - started)
            if answer.status_code != 200:
                seen.errors.append(f"{path}: {answer.status_code} {answer.text[:200]}")


async def write(url: str, token: str, writer: int, until_s: float, folder: Path, seen: Seen) -> None:
    """Push one pack after the other; where the server is busy, come again as it says."""
    headers, number = {"Authorization": f"Bearer {token}"}, 0
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=120, trust_env=False, verify=False) as client:
        while time.monotonic() < until_s:
            rows = [measured(writer, number + each) for each in range(ROWS_A_PACK)]
            path = folder / f"{writer}.parquet"
            await asyncio.to_thread(write_pack, rows, path)
            content = path.read_bytes()
            answer = await client.put(f"/v1/packs/{hashlib.sha256(content).hexdigest()}", content=content)
            if answer.status_code == 503:
                await asyncio.sleep(float(answer.headers["retry-after"]))
                continue
            if answer.status_code != 201 or answer.json()["added"] != ROWS_A_PACK:
                seen.errors.append(f"pack: {answer.status_code} {answer.text[:200]}")
            else:
                seen.acknowledged += [one.id for one in rows]
            number += ROWS_A_PACK


async def load(url: str, token: str, options: argparse.Namespace, folder: Path) -> tuple[Seen, Seen]:
    """Run readers and writers together, then readers of a constant alone."""
    real, constant = Seen(), Seen()
    until_s = time.monotonic() + options.seconds
    readers = [read(url, "/v1/estimate", until_s, real) for _ in range(options.readers)]
    writers = [write(url, token, each, until_s, folder, real) for each in range(options.writers)]
    await asyncio.gather(*readers, *writers)
    until_s = time.monotonic() + min(options.seconds, 20)
    await asyncio.gather(*(read(url, "/health", until_s, constant) for _ in range(options.readers)))
    return real, constant


def stored(url: str) -> list[str]:
    """Return the ids of all measurements, from all packs of the server, each as often as it is there."""
    from whichlora_profiles_db import open_remote, open_store, pull

    with tempfile.TemporaryDirectory() as folder:
        store = open_store(Path(folder) / "copy.duckdb")
        pull(store, open_remote(url))
        total = httpx.post(f"{url}/v1/stats", json={}, timeout=120, trust_env=False).json()["total"]
        found = [one.id for one in store.query()]
    return found if total == len(found) else [*found, f"the server counts {total}"]


def summary(real: Seen, constant: Seen, seconds: float) -> dict[str, float]:
    """Return requests a second and 95th percentiles, and their ratios to the constant's."""

    def figures(seen: Seen, over_s: float) -> tuple[float, float]:
        return len(seen.times_s) / over_s, statistics.quantiles(seen.times_s, n=20)[-1]

    (rate, p95_s), (least_rate, least_s) = figures(real, seconds), figures(constant, min(seconds, 20))
    return {
        "requests_per_s": rate,
        "p95_s": p95_s,
        "constant_requests_per_s": least_rate,
        "constant_p95_s": least_s,
        "rate_ratio": rate / least_rate,
        "p95_ratio": p95_s / least_s,
        "measurements_acknowledged": len(real.acknowledged),
    }


def main() -> None:
    """Start, load, count, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--readers", type=int, default=200)
    parser.add_argument("--writers", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=60.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        (port,) = free_ports()
        store = Path(name) / "store.duckdb"
        token = Tokens(tokens_path(store)).create(Role.CONTRIBUTOR, "load")
        command = [sys.executable, "-m", "whichlora", "serve", "--db", str(store), "--port", str(port), "--rate", "0"]
        server = subprocess.Popen(command, env=dict(os.environ))
        url = f"http://127.0.0.1:{port}"
        try:
            until(lambda: answers(f"{url}/health"), "the server does not answer")
            real, constant = asyncio.run(load(url, token, options, Path(name)))
            ids = stored(url)
        finally:
            server.terminate()
            server.wait(60)
    lost, doubled = set(real.acknowledged) - set(ids), len(ids) - len(set(ids))
    errors = [*real.errors, *constant.errors]
    print(json.dumps(summary(real, constant, options.seconds) | {"errors": len(errors), "lost": len(lost)}, indent=1))
    for error in errors[:5]:
        print(error, file=sys.stderr)
    if errors or lost or doubled or set(ids) - set(real.acknowledged):
        sys.exit(1)


if __name__ == "__main__":
    main()
