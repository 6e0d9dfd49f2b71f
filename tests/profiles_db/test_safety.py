"""What becomes of a store when processes meet, are killed, or find a file that is something else."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
import pytest

from whichlora_estimators.errors import WhichloraError
from whichlora_profiles_db import (
    NotAStore,
    Store,
    StoreBusy,
    StoreError,
    StoreTooNew,
    measurement_to_json,
    open_store,
    session,
)
from whichlora_profiles_db.migrations import all_migrations, latest, migrate
from whichlora_profiles_db.rows import RowWriter
from whichlora_profiles_db.store import insert

from .records import FULL, PLAIN, numbered

KILL_TEST = Path(__file__).parents[2] / "benchmarks" / "store_kill.py"
ENVIRON = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
SETTINGS: dict[str, Any] = {"storage_compatibility_version": "v1.2.0"}

# Adds the measurements whose JSON lines come on stdin, one by one.
WRITER = """
import json, sys
from pathlib import Path
from whichlora_profiles_db import measurement_from_json, open_store
for line in sys.stdin:
    assert open_store(Path(sys.argv[1])).add([measurement_from_json(json.loads(line))]) == 1
"""
# Holds the file open until stdin closes.
HOLDER = """
import sys, duckdb
connection = duckdb.connect(sys.argv[1], read_only=sys.argv[2] == "read")
print("open", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Return a store with one measurement that does not wait long."""
    store = open_store(tmp_path / "store.duckdb", wait_s=20)
    store.add([FULL])
    return store


@contextmanager
def held(path: Path, how: str) -> Iterator[subprocess.Popen[str]]:
    """Keep `path` open in another process, to "read" or to "write"."""
    command = [sys.executable, "-c", HOLDER, str(path), how]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=ENVIRON, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "open\n"
        yield process
        process.communicate()


def raw(path: Path) -> duckdb.DuckDBPyConnection:
    """Open a file without the store's care."""
    return duckdb.connect(str(path), config=SETTINGS)


def uses(store: Store) -> list[Callable[[], object]]:
    """Return each way to use a store."""
    return [
        store.query,
        store.count,
        store.stats,
        lambda: list(store.iterate()),
        lambda: store.get(FULL.id),
        lambda: store.known([FULL.id]),
        lambda: store.add([PLAIN]),
    ]


def test_a_store_in_use_is_waited_for_and_then_named(store: Store) -> None:
    """While another process writes, everything waits as long as it may and then names that process."""
    with held(store.path, "write") as process:
        for use in uses(open_store(store.path, wait_s=0.1)):
            with pytest.raises(StoreBusy, match=rf"Waited 0\.\d s; let process {process.pid} finish"):
                use()
        threading.Timer(0.3, process.stdin.close if process.stdin else print).start()
        assert store.add([PLAIN]) == 1
        process.stdin = None


def test_readers_do_not_wait_for_readers(store: Store) -> None:
    """While another process reads, reading goes on and writing waits."""
    with held(store.path, "read"):
        impatient = open_store(store.path, wait_s=0)
        assert impatient.query() == [FULL]
        with pytest.raises(StoreBusy):
            impatient.add([PLAIN])
    assert store.query() == [FULL]


def test_another_connection_of_this_process_is_waited_for_too(store: Store) -> None:
    """A connection that the program itself holds is somebody else's use as well."""
    connection = duckdb.connect(str(store.path))
    with pytest.raises(StoreBusy):
        open_store(store.path, wait_s=0.1).query()
    threading.Timer(0.2, connection.close).start()
    assert store.query() == [FULL]


def test_writers_lose_nothing(tmp_path: Path) -> None:
    """Processes that begin together on a store that is not there yet all succeed, and every row is there once."""
    path = tmp_path / "store.duckdb"
    shares = [[numbered(10 * writer + number) for number in range(6)] for writer in range(3)]
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdin=subprocess.PIPE, env=ENVIRON, text=True)
        for _ in shares
    ]
    for writer, share in zip(writers, shares, strict=True):
        assert writer.stdin
        writer.stdin.write("\n".join(json.dumps(measurement_to_json(one)) for one in share))
        writer.stdin.close()
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    found = [one.id for one in open_store(path).query()]
    assert sorted(found) == sorted(one.id for share in shares for one in share)
    assert [left.name for left in tmp_path.iterdir()] == ["store.duckdb"]


def test_making_a_store_never_replaces_one(store: Store) -> None:
    """Who was about to make a store when another was faster keeps the other's."""
    session._create(store.path, session._Deadline(5))
    assert store.query() == [FULL]
    assert [path.name for path in store.path.parent.iterdir()] == ["store.duckdb"]


def test_threads_lose_nothing(store: Store) -> None:
    """Threads that read and add at once succeed, and every row is there once."""
    failures = []

    def work(thread: int) -> None:
        try:
            for number in range(4):
                store.add([numbered(10 * thread + number)])
                assert store.count() > number
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len({one.id for one in store.query()}) == store.count() == 17


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs an operating system that forks")
def test_a_fork_may_use_the_store(store: Store) -> None:
    """A process forked while a thread of its parent works on the store waits for the file and not for that thread."""
    started, finish = threading.Event(), threading.Event()

    def work() -> None:
        with session.writing(store.path, wait_s=5):
            started.set()
            finish.wait()

    worker = threading.Thread(target=work)
    worker.start()
    started.wait()
    pid = os.fork()
    if not pid:
        try:
            os._exit(open_store(store.path, wait_s=5).add([PLAIN]) - 1)
        finally:
            os._exit(9)
    time.sleep(0.2)
    finish.set()
    worker.join()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert store.count() == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs an operating system that forks")
def test_killed_writers_lose_nothing_that_was_reported() -> None:
    """Whatever `add` returned for is in the store after SIGKILL at random moments, and the store opens.

    WHICHLORA_KILL_ROUNDS sets the number of rounds, of two kills each.
    """
    rounds = os.environ.get("WHICHLORA_KILL_ROUNDS", "12")
    done = subprocess.run(
        [sys.executable, str(KILL_TEST), "--rounds", rounds], env=ENVIRON, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{2 * int(rounds):6d} kills" in done.stdout


def test_an_exception_amid_a_transaction_leaves_no_trace(store: Store) -> None:
    """What was written before an exception is rolled back."""

    def write_and_fail() -> None:
        with session.writing(store.path, wait_s=5) as connection:
            connection.execute("DELETE FROM measurement")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_and_fail()
    assert store.query() == [FULL]


def test_a_torn_log_costs_only_what_was_not_committed(store: Store) -> None:
    """Wherever a crash tore the log, the store opens with the batches whose commit is in it, whole, and takes more."""
    batches = [[numbered(10 * batch + number) for number in range(3)] for batch in range(3)]
    shutil.copy(store.path, grown := store.path.with_name("grown.duckdb"))
    log = Path(f"{grown}.wal")
    ends = [0]
    for batch in batches:
        with raw(grown) as connection:
            connection.execute("PRAGMA disable_checkpoint_on_shutdown")
            connection.execute("BEGIN TRANSACTION")
            assert insert(connection, RowWriter(batch)) == len(batch)
            connection.execute("COMMIT")
        ends.append(log.stat().st_size)
    main, written = grown.read_bytes(), log.read_bytes()
    assert main == store.path.read_bytes()
    for cut in sorted({*ends, *(end + by for end in ends[1:] for by in (-9, -1)), *range(0, len(written), 2500)}):
        complete = sum(end <= cut for end in ends) - 1
        torn = open_store(store.path.with_name(f"{cut}.duckdb"))
        torn.path.write_bytes(main)
        Path(f"{torn.path}.wal").write_bytes(written[:cut])
        expected = {FULL.id} | {one.id for batch in batches[:complete] for one in batch}
        assert {one.id for one in torn.query()} == expected
        assert torn.add([numbered(99)]) == 1
        assert {one.id for one in torn.query()} == expected | {numbered(99).id}


@pytest.mark.parametrize("number", range(latest()))
def test_older_stores_are_brought_up_to_date(tmp_path: Path, number: int) -> None:
    """A file of any older schema, the empty one included, is a store after its first use, in order and once."""
    path = tmp_path / "old.duckdb"
    with raw(path) as connection:
        migrate(connection, path, to=number)
    store = open_store(path)
    assert store.query() == []
    assert store.add([FULL]) == 1
    assert store.query() == [FULL]
    with raw(path) as connection:
        done = connection.execute("SELECT number, name FROM whichlora_migration").fetchall()
    assert done == [(migration.number, migration.name) for migration in all_migrations()]


@pytest.mark.parametrize("number", range(latest()))
def test_a_migration_that_a_crash_cut_short_is_done_again(tmp_path: Path, number: int) -> None:
    """Wherever a crash tore the log of a migration, the file opens with the old schema or the new, and is upgraded."""
    path = tmp_path / "old.duckdb"
    with raw(path) as connection:
        migrate(connection, path, to=number)
    with raw(path) as connection:
        connection.execute("PRAGMA disable_checkpoint_on_shutdown")
        connection.execute("BEGIN TRANSACTION")
        connection.execute(all_migrations()[number].sql)
        connection.execute("INSERT INTO whichlora_migration VALUES (?, 'name', TIMESTAMP '2026-01-01')", [number + 1])
        connection.execute("COMMIT")
    main, log = path.read_bytes(), Path(f"{path}.wal").read_bytes()
    for cut in (*range(0, len(log), len(log) // 8), len(log) - 1, len(log)):
        store = open_store(tmp_path / f"{cut}.duckdb")
        store.path.write_bytes(main)
        Path(f"{store.path}.wal").write_bytes(log[:cut])
        assert store.add([FULL]) == 1
        assert store.query() == [FULL]


def test_a_store_from_the_future_is_refused(store: Store) -> None:
    """A schema that we do not know is neither read nor written."""
    with raw(store.path) as connection:
        connection.execute("INSERT INTO whichlora_migration VALUES (?, 'later', now())", [latest() + 1])
    before = store.path.read_bytes()
    session._recognized.clear()
    for use in uses(store):
        with pytest.raises(StoreTooNew, match=f"schema {latest() + 1} .* up to {latest()}: upgrade whichlora"):
            use()
    assert store.path.read_bytes() == before


def test_a_store_that_was_upgraded_meanwhile_is_not_used(store: Store) -> None:
    """A process that knew a store before somebody upgraded it looks again, each time."""
    with raw(store.path) as connection:
        connection.execute("INSERT INTO whichlora_migration VALUES (?, 'later', now())", [latest() + 1])
    for use in uses(store):
        with pytest.raises(StoreTooNew):
            use()


def _sqlite(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE measurement (id TEXT)")
    connection.commit()
    connection.close()


def _other_duckdb(path: Path) -> None:
    with raw(path) as connection:
        connection.execute("CREATE TABLE measurement (id TEXT)")


def _cut(path: Path) -> None:
    open_store(path).add([FULL])
    path.write_bytes(path.read_bytes()[:9000])


def _scribbled(path: Path) -> None:
    open_store(path).add([FULL])
    content = bytearray(path.read_bytes())
    content[4096:12288] = b"\x5a" * 8192  # both headers that say where everything is
    path.write_bytes(content)


FOREIGN = {
    "empty": lambda path: path.write_bytes(b""),
    "short": lambda path: path.write_bytes(b"x"),
    "text": lambda path: path.write_text("a,b\n" * 5000, encoding="utf-8"),
    "magic": lambda path: path.write_bytes(b"\0" * 8 + b"DUCK" + os.urandom(20_000)),
    "sqlite": _sqlite,
    "other duckdb": _other_duckdb,
    "cut": _cut,
    "scribbled": _scribbled,
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_file_that_is_no_store_stays_as_it_is(tmp_path: Path, kind: str) -> None:
    """A damaged or foreign file is refused with its name, whatever is asked of it, and not a byte of it changes."""
    path = tmp_path / "file"
    FOREIGN[kind](path)
    session._recognized.clear()
    before = path.read_bytes()
    for use in uses(open_store(path)):
        with pytest.raises(NotAStore, match=str(path)):
            use()
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_no_store(tmp_path: Path) -> None:
    """A folder is refused as such."""
    with pytest.raises(NotAStore, match="a folder"):
        open_store(tmp_path).add([PLAIN])


def test_a_store_that_cannot_be_made_says_so(tmp_path: Path) -> None:
    """Where a file is in the way of the folder, the error names the store and nothing is left behind."""
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="cannot be made"):
        open_store(tmp_path / "file" / "store.duckdb").add([PLAIN])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_store_out_of_reach_is_not_an_empty_one(tmp_path: Path) -> None:
    """Where it cannot be seen whether there is a store, nothing pretends that there is none."""
    for use in uses(open_store(tmp_path / ("x" * 300) / "store.duckdb")):
        with pytest.raises(StoreError, match="cannot be found"):
            use()


def test_damage_inside_is_an_error_and_no_wrong_number(store: Store) -> None:
    """With any one block overwritten, a store gives what it was given, or an error, and changes nothing by reading."""
    store.add([numbered(number) for number in range(5)])
    expected = store.query()
    content = store.path.read_bytes()
    refused = 0
    for start in range(12288, len(content), 262144 // 2):
        damaged = open_store(store.path.with_name(f"{start}.duckdb"))
        damaged.path.write_bytes(content[:start] + bytes(64) + content[start + 64 :])
        before = damaged.path.read_bytes()
        try:
            assert damaged.query() == expected
        except WhichloraError:
            refused += 1
        assert damaged.path.read_bytes() == before
    assert refused


def test_a_row_that_contradicts_itself_is_named(store: Store) -> None:
    """A row that another program spoilt is an error with its id."""
    with raw(store.path) as connection:
        connection.execute("UPDATE measurement SET outcome = 'fine'")
    with pytest.raises(StoreError, match=FULL.id):
        store.query()
