"""Laws of remotes: many writers, no lock, nothing lost and nothing doubled."""

from __future__ import annotations

import dataclasses
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

import pytest

from whichlora_profiles_db import (
    Filters,
    Measurement,
    RemoteError,
    Store,
    open_remote,
    open_store,
    pull,
    push,
    remote_stats,
    write_pack,
)
from whichlora_profiles_db.pack_reader import PackReader
from whichlora_profiles_db.remotes import is_pack_name, pack_name, partition
from whichlora_profiles_db.session import reading

from .lab import measured
from .records import ENVIRONMENT, FULL, PLAIN, numbered
from .s3server import BUCKET, s3_server

LAB = Path(__file__).with_name("lab.py")
CARDS = [f"card-{number}" for number in range(10)]
USERS = ("ada", "bob", "eve")


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """Return the URL of an empty remote on an S3 server process."""
    pytest.importorskip("s3fs", reason="needs the extra remotes")
    pytest.importorskip("moto", reason="needs the extra dev")
    with s3_server() as variables, pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        yield f"s3://{BUCKET}"


@pytest.fixture(scope="module")
def reader() -> Iterator[PackReader]:
    """Return a reader whose process serves this module."""
    with PackReader(jobs=1) as reader:
        yield reader


@pytest.fixture(params=["folder", "memory", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the URL of an empty remote: a folder, fsspec's file system in memory, and a place on an S3 server."""
    if request.param == "folder":
        return str(tmp_path / "remote")
    if request.param == "memory":
        return f"memory://lab/{tmp_path.name}"
    return f"{request.getfixturevalue('s3')}/{tmp_path.name}"


def on(card: str | None, number: int) -> Measurement:
    """Return a measurement on a card."""
    return numbered(number, environment=dataclasses.replace(ENVIRONMENT, gpu=card))


def ids(store: Store) -> list[str]:
    """Return the id of every row, doubled ones twice."""
    with reading(store.path, wait_s=20) as connection:
        return sorted(id_ for (id_,) in connection.execute("SELECT id FROM measurement").fetchall())


def packed_rows(url: str) -> int:
    """Return how many rows the packs of a remote have together."""
    return sum(group.total for group in remote_stats(open_remote(url)))


def test_two_users_meet_on_a_remote(tmp_path: Path, url: str, reader: PackReader) -> None:
    """What one pushes the other pulls, once, without names; a second push and pull do nothing."""
    one, other, remote = open_store(tmp_path / "one"), open_store(tmp_path / "other"), open_remote(url)
    assert remote.list() == []
    one.add([on("a", 1), on("b", 2), on(None, 3), FULL])
    other.add([on("a", 1), on("a", 4)])
    assert push(one, remote).rows == 4
    assert push(one, remote).packs == ()
    assert pull(other, remote, reader=reader).added == 3
    assert push(other, remote).rows == 1
    assert pull(one, remote, reader=reader).added == 1
    assert push(one, remote).packs == push(other, remote).packs == ()
    assert pull(other, remote, reader=reader).packs == ()
    assert ids(one) == ids(other)
    assert packed_rows(url) == len(ids(one)) == 5
    assert other.get(FULL.id).environment.host_name is None


def test_an_emptied_remote_is_filled_again(tmp_path: Path, reader: PackReader) -> None:
    """What a store once pushed it pushes again where the packs are gone, and to another remote as well."""
    store = open_store(tmp_path / "store")
    store.add([on("a", 1), on("b", 2)])
    for place in ("one", "two"):
        assert push(store, open_remote(str(tmp_path / place))).rows == 2
    next((tmp_path / "one").rglob("*.parquet")).unlink()
    assert push(store, open_remote(str(tmp_path / "one"))).rows == 1


def test_a_remote_is_asked_in_place(tmp_path: Path, url: str) -> None:
    """Counts of a remote equal those of a store with the same rows, for any filter, and spoilt packs elsewhere are not read."""
    store, remote = open_store(tmp_path / "store"), open_remote(url)
    when = [datetime(2026, month, 15, tzinfo=timezone.utc) for month in (1, 2, 3)]
    store.add(
        [on(card, number).with_(measured_at=moment) for number, moment in enumerate(when) for card in ("a", "b", None)]
    )
    push(store, remote)
    since = datetime(2026, 2, 1, tzinfo=timezone.utc)
    for filters in (
        None,
        Filters(gpu="A"),
        Filters(gpu=["b", "x"]),
        Filters(gpu="?"),
        Filters(since=since),
        Filters(until=since),
    ):
        assert remote_stats(remote, filters) == store.stats(filters).groups
    (tmp_path / "junk").write_bytes(b"PAR1junk")
    remote.put(pack_name("c", "2026-02", "0" * 64), tmp_path / "junk")
    assert remote_stats(remote, Filters(gpu="a", since=since)) == store.stats(Filters(gpu="a", since=since)).groups
    with pytest.raises(RemoteError):
        remote_stats(remote)


def test_what_does_not_hash_to_its_name_is_no_pack(tmp_path: Path, url: str, reader: PackReader) -> None:
    """An upload that was cut off, and a bad pack, keep no other pack from coming; the bad one is fetched once."""
    store, remote = open_store(tmp_path / "store"), open_remote(url)
    good = write_pack([on("a", 1)], tmp_path / "good")
    bad = write_pack([FULL.with_(outcome="ok", error="", weights_bytes=10**9)], tmp_path / "bad")
    (tmp_path / "part").write_bytes(good.path.read_bytes()[:-50])
    remote.put(pack_name("a", "2026-01", "0" * 64), tmp_path / "part")
    remote.put(bad_name := pack_name("b", "2026-01", bad.sha256), bad.path)
    remote.put(good_name := pack_name("a", "2026-01", good.sha256), good.path)
    first, second = (pull(store, remote, reader=reader) for _ in range(2))
    assert first.packs == (good_name,)
    assert set(first.refused) == {bad_name, pack_name("a", "2026-01", "0" * 64)}
    assert "below its weights_bytes" in first.refused[bad_name]
    assert second.waiting == (bad_name,)
    assert second.packs == ()
    assert ids(store) == [on("a", 1).id]
    assert bad_name in pull(store, remote, again=True, reader=reader).refused


def test_names_play_no_tricks() -> None:
    """A pack's name is made of its card whatever that is called, leads nowhere else, and tells the card again."""
    for card in ("rtx-4090", "../../etc", "/x", "..", ".", "none", "%6eone", "a b", "a=b/c", "ü", "x" * 90, "%2e"):
        name = pack_name(card, "2026-01", "0" * 64)
        assert is_pack_name(name)
        assert name.count("/") == 2
        assert ".." not in name.split("/")
        assert partition(name) == (card, "2026-01")
    assert partition(pack_name(None, None, "0" * 64)) == (None, None)
    for name in (
        "x.parquet",
        "gpu=../month=2026-01/" + "0" * 64 + ".parquet",
        "gpu=a/month=2026-01/../" + "0" * 64 + ".parquet",
    ):
        assert not is_pack_name(name) or ".." not in Path(name).parts


def test_urls_that_lead_nowhere_say_so() -> None:
    """An unknown protocol, and a server that is not there, are errors that name the URL."""
    for url in ("gopher://lab", "nonsense://x", "s3://", "memory:///", " "):
        with pytest.raises(RemoteError, match=url):
            open_remote(url)


@pytest.mark.parametrize(
    ("url", "package", "name"),
    [("gs://lab", "gcsfs", "gcsfs"), ("hf://datasets/a/b", "huggingface_hub", "huggingface-hub")],
)
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, url: str, package: str, name: str) -> None:
    """Without the package that reaches a place, the error says which to install."""
    registry = pytest.importorskip("fsspec.registry")
    monkeypatch.delitem(registry._registry, url.partition(":")[0], raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(RemoteError, match=f"install {name}"):
        open_remote(url)


def test_an_interrupted_upload_is_invisible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder shows a pack only once it is complete; what a killed writer left behind is not looked at."""
    store, remote = open_store(tmp_path / "store"), open_remote(str(tmp_path / "remote"))
    store.add([on("a", 1)])
    (tmp_path / "remote" / "gpu=a" / "month=2026-01").mkdir(parents=True)
    (tmp_path / "remote" / "gpu=a" / "month=2026-01" / ".half.new").write_bytes(b"PAR1")
    assert remote.list() == []
    assert push(store, remote).rows == 1
    assert len(remote.list()) == 1


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs an operating system that kills")
def test_a_lab_converges(tmp_path: Path, s3: str, reader: PackReader) -> None:
    """Three users, ten cards, one remote, users killed at random moments: all end with the same rows, none lost or doubled.

    WHICHLORA_LAB_ROWS sets how many each of them measures.
    """
    rows, rng, url = int(os.environ.get("WHICHLORA_LAB_ROWS", "8")), random.Random(5), f"{s3}/converging"
    shares = {user: CARDS[place::3] for place, user in enumerate(USERS)}
    told: dict[str, set[int]] = {user: set() for user in USERS}
    running = {user: _start(tmp_path, url, user, 0, rows, shares[user]) for user in USERS}
    kills = 0
    while running:
        time.sleep(0.2)
        for user, process in list(running.items()):
            if process.poll() is None and (kills >= 4 or rng.random() > 0.1):
                continue
            process.kill()
            assert process.wait() in (0, -signal.SIGKILL)
            kills += process.returncode != 0
            assert process.stdout
            lines = process.stdout.read().split()
            told[user] |= {int(line) for line in lines if line != "done"}
            if lines[-1:] == ["done"]:
                del running[user]
            else:
                first = max(told[user], default=-1) + 1
                running[user] = _start(tmp_path, url, user, first, rows - first, shares[user])
    assert kills
    stores = {user: open_store(tmp_path / user) for user in USERS}
    for _ in range(2):
        for store in stores.values():
            pull(store, open_remote(url), reader=reader)
            push(store, open_remote(url))
    expected = sorted(
        measured(user, number, shares[user][number % len(shares[user])]).id for user in USERS for number in range(rows)
    )
    assert all(told[user] == set(range(rows)) for user in USERS)
    assert [ids(store) for store in stores.values()] == [expected] * 3
    assert packed_rows(url) == len(expected)


def _start(folder: Path, url: str, user: str, first: int, count: int, cards: list[str]) -> subprocess.Popen[str]:
    command = [sys.executable, str(LAB), str(folder / user), url, user, str(first), str(count), ",".join(cards)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def test_plain_rows_without_a_card_travel_too(tmp_path: Path, reader: PackReader) -> None:
    """What has no card and no date goes to a place of its own and comes back whole."""
    published = PLAIN.with_(evidence="published", device="cuda", measured_at=None, source="a table")
    store, other, remote = open_store(tmp_path / "s"), open_store(tmp_path / "o"), open_remote(str(tmp_path / "r"))
    store.add([published])
    push(store, remote)
    assert [name.rpartition("/")[0] for name in remote.list()] == ["gpu=none/month=none"]
    pull(other, remote, reader=reader)
    assert other.query() == [published]
