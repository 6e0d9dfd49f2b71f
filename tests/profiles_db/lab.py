"""One user of a simulated lab: measures on some cards, pushes and pulls, and is killed at any moment.

    python lab.py STORE URL USER FIRST COUNT CARDS

Adds measurements FIRST to FIRST + COUNT of USER, each on the next of CARDS, exchanging now and then, and says on stdout
which of them `add` returned for. Killed and started again, it goes on where it was.
"""

from __future__ import annotations

import sys
from datetime import datetime, timedelta, timezone
from pathlib import Path

from whichlora_estimators.workload import Workload
from whichlora_profiles_db import Environment, Measurement, open_remote, open_store, pull, push
from whichlora_profiles_db.pack_reader import PackReader

_START = datetime(2026, 1, 28, tzinfo=timezone.utc)


def measured(user: str, number: int, card: str) -> Measurement:
    """Return what a user measures as their `number`th, whenever they do."""
    return Measurement(
        workload=Workload(model="example/model", config={"hidden_size": 64}),
        environment=Environment(gpu=card, host_name=f"{user}-desk", user_name=user, versions={"torch": "2.6.0"}),
        evidence="measured",
        device="cuda",
        outcome="ok",
        measured_at=_START + timedelta(hours=number),
        allocated_peak_bytes=10**9 + number,
        notes=f"{user} {number}",
    )


def main() -> None:
    """Measure and exchange until all is done."""
    path, url, user, first, count, cards = sys.argv[1:]
    store, remote, names = open_store(Path(path)), open_remote(url), cards.split(",")
    with PackReader(jobs=1) as reader:
        for number in range(int(first), int(first) + int(count)):
            store.add([measured(user, number, names[number % len(names)])])
            print(number, flush=True)  # noqa: T201
            if number % 3 == 0:
                push(store, remote)
            if number % 4 == 0:
                pull(store, remote, reader=reader)
    print("done", flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
