"""What others published, as far as it is fully specified: a pack that ships with this package and is only read.

It stands beside every store as a layer of its own and is never copied into one. How it came about is in
`benchmarks/make_published_pack.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from whichlora_estimators.errors import BadValue

from .filters import Filters, where
from .measurement import Measurement
from .packs import all_columns, literal_path, pack_measurements, read_manifest

PATH = Path(__file__).parent / "data" / "published.parquet"
#: In the notes of a measurement whose workload has a length that was fitted on that same measurement.
RELATIVE = "only relative to its source's others"

_NOTES = "class {completeness}; trusted for {trusted}; {remarks}cell {cell}"
_FACTS = re.compile(
    r"class (?P<completeness>[AB]); trusted for (?P<trusted>[a-z_A-Z ]*); .*?cell (?P<cell>.*)", re.DOTALL
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedFacts:
    """How far a published measurement may be trusted.

    `completeness` is A for a workload that its source specifies fully, B where one or two assumptions were made;
    `trusted_for` names what it may judge ("memory", "time", "memory_relative", "feasibility"); measurements of one
    `cell` are of one workload on other days or versions and together weigh as one.
    """

    completeness: str
    trusted_for: tuple[str, ...]
    cell: str


def published(filters: Filters | None = None) -> Iterator[Measurement]:
    """Yield the published measurements that `filters` let through, the latest first, those without a date last."""
    import duckdb

    condition, values = where(filters)
    columns = all_columns(read_manifest(PATH).format)
    with duckdb.connect(config={"threads": 1}) as connection:
        rows = connection.execute(
            f"SELECT {columns} FROM read_parquet(?) WHERE {condition} ORDER BY measured_at DESC NULLS LAST, id",
            [literal_path(PATH), *values],
        ).fetchall()
    yield from pack_measurements(rows)


def published_facts(measurement: Measurement) -> PublishedFacts:
    """Return how far to trust one of `published()`. Raises BadValue for a measurement that is none of them."""
    found = _FACTS.fullmatch(measurement.notes)
    if measurement.evidence != "published" or not found:
        todo = "Ask about the measurements that published() yields."
        raise BadValue("not a measurement of the published pack", value=measurement.id, todo=todo)
    return PublishedFacts(
        completeness=found["completeness"], trusted_for=tuple(found["trusted"].split()), cell=found["cell"]
    )


def notes_of(known: PublishedFacts, *remarks: str) -> str:
    """Write facts into notes, where `published_facts` finds them again."""
    said = "".join(f"{remark}; " for remark in remarks)
    trusted = " ".join(known.trusted_for)
    return _NOTES.format(completeness=known.completeness, trusted=trusted, remarks=said, cell=known.cell)
