"""Taking packs of others into a store: checked first, whole or not at all, and what is refused is kept aside."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from . import session, union
from .checks import utc_text
from .errors import BadPack
from .pack_checks import Rejected
from .pack_reader import OnRows, PackReader, ReadPack, pack_sha256
from .packs import Manifest, producer, read_manifest
from .store import Store

_SHOWN = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """What became of a pack: its hash, its rows, how many were new to the store, and how many were left out."""

    sha256: str
    manifest: Manifest
    added: int
    rejected_count: int = 0
    quarantine: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedPack:
    """What `check_pack` found: the rows that may not enter a store, the first of them in full."""

    sha256: str
    manifest: Manifest
    rejected_count: int
    rejected: tuple[Rejected, ...]


def check_pack(
    pack: Path, *, reader: PackReader | None = None, limit: int = _SHOWN, on_rows: OnRows | None = None
) -> CheckedPack:
    """Check a pack as an import would, without a store. Raises BadPack for one that has no right form."""
    with reading(reader) as opened, opened.read(pack, on_rows=on_rows) as read:
        return CheckedPack(
            sha256=read.sha256,
            manifest=read.manifest,
            rejected_count=len(read.rejected_rows),
            rejected=tuple(read.rejected(limit)),
        )


def import_pack(
    store: Store,
    pack: Path,
    *,
    partial: bool = False,
    name: str = "",
    reader: PackReader | None = None,
    on_rows: OnRows | None = None,
) -> Imported:
    """Add what a pack holds to a store: a union, all of it or nothing.

    Every row is checked: its hash, each column against the others, and bounds that physics sets. A pack with a row that
    fails is refused as a whole; with `partial`, its other rows are taken. The failed rows are written, with reasons,
    into the store's quarantine under the pack's hash. `name` is what the pack is called there and in errors.
    Raises BadPack, after which the store is as it was, and what `Store` raises.
    """
    name = name or pack.name
    if is_imported(store, sha256 := pack_sha256(pack)):
        return Imported(sha256=sha256, manifest=read_manifest(pack), added=0)
    with reading(reader) as opened:
        try:
            with opened.read(pack, on_rows=on_rows) as read:
                return _take(store, read, name, partial=partial)
        except _Refused:
            raise
        except BadPack as error:
            quarantine(store, sha256, name, why=str(error))
            raise


def is_imported(store: Store, sha256: str) -> bool:
    """Say whether a pack's rows are known to be in the store."""
    if not store.exists:
        return False
    with session.reading(store.path, wait_s=store.wait_s) as connection:
        return union.is_packed(connection, sha256)


class _Refused(BadPack):
    """A pack with rows that may not enter a store; they are in quarantine."""


def _take(store: Store, read: ReadPack, name: str, *, partial: bool) -> Imported:
    kept = None
    if count := len(read.rejected_rows):
        kept = quarantine(store, read.sha256, name, why=f"{count} of {read.manifest.rows} rows rejected", read=read)
        if not partial:
            raise _refused(read, name, kept)
    added = _insert(store, read)
    return Imported(sha256=read.sha256, manifest=read.manifest, added=added, rejected_count=count, quarantine=kept)


def _refused(read: ReadPack, name: str, kept: Path) -> BadPack:
    shown = "; ".join(f"row {one.row}: {one.reasons[0]}" for one in read.rejected(_SHOWN))
    more = len(read.rejected_rows) - _SHOWN
    what = f"a pack with {len(read.rejected_rows)} of {read.manifest.rows} rows that cannot be ({shown}"
    todo = f"Nothing was imported; the rows are in {kept}. Import the others with --partial, or ask for a better pack."
    return _Refused(f"{what}; {more} more)" if more > 0 else f"{what})", value=name, todo=todo)


def _insert(store: Store, read: ReadPack) -> int:
    outside = session.Outside(databases={"pack": read.staged})
    with session.writing(store.path, wait_s=store.wait_s, outside=outside) as connection:
        if union.is_packed(connection, read.sha256):
            return 0
        connection.execute("CREATE TEMP TABLE rejected (row BIGINT)")
        connection.execute("INSERT INTO rejected SELECT unnest(?::BIGINT[])", [list(read.rejected_rows)])
        good = "(SELECT * FROM pack.staged WHERE row NOT IN (SELECT row FROM rejected))"
        added = union.add_rows(connection, good, order="row")
        union.add_configs(
            connection, f"(SELECT id, config FROM pack.config WHERE id IN (SELECT config_id FROM {good}))"
        )
        union.add_origins(
            connection,
            "(SELECT * FROM (SELECT id AS measurement_id, unnest(['host_name', 'user_name']) AS kind, "
            f"unnest([host_name, user_name]) AS name FROM {good}) WHERE name IS NOT NULL)",
        )
        union.note_packed(connection, read.sha256, f"SELECT id FROM {good}")
        connection.execute("DROP TABLE rejected")
    return added


def quarantine_folder(store: Store) -> Path:
    """Return the folder beside a store that holds what was refused."""
    return store.path.with_name(f"{store.path.name}.quarantine")


def quarantine(store: Store, sha256: str, name: str, *, why: str, read: ReadPack | None = None) -> Path:
    """Write down why a pack was refused, and its rejected rows: one JSON object a line, the pack's first."""
    folder = quarantine_folder(store)
    head = {"pack": sha256, "name": name, "why": why, "refused_at": utc_text(datetime.now(timezone.utc))}
    path = folder / f"{sha256}.jsonl"
    fresh = path.with_suffix(".new")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with fresh.open("w", encoding="utf-8") as file:
            file.write(json.dumps(head | {"by": producer()}) + "\n")
            file.writelines(read.lines() if read else ())
        fresh.replace(path)
    except OSError as error:
        todo = f"The pack was refused: {why}. Make the folder writable to see its rows. ({error.strerror})"
        raise BadPack("what a pack holds could not be put into quarantine", value=str(folder), todo=todo) from error
    return path


@contextlib.contextmanager
def reading(reader: PackReader | None) -> Iterator[PackReader]:
    """Use a reader that is there, or one of our own."""
    if reader:
        yield reader
    else:
        with PackReader() as own:
            yield own


def was_refused(store: Store, sha256: str) -> bool:
    """Say whether this version has refused a pack before."""
    try:
        with (quarantine_folder(store) / f"{sha256}.jsonl").open(encoding="utf-8") as file:
            head = json.loads(file.readline())
    except (OSError, ValueError):
        return False
    return isinstance(head, dict) and head.get("by") == producer()
