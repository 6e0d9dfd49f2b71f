"""Two stores and a server, each with a network of its own, converge; also where the link breaks in the midst of a pack."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.profiles_db.lab import measured
from whichlora.serve.tokens import Role, Tokens, tokens_path
from whichlora_profiles_db import open_store

PORT = 8642
NAMES = ("hub", "one", "two")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def networks() -> Iterator[dict[str, str]]:
    """Join three namespaces: a server at 10.77.1.1 and 10.77.2.1, and a client at the other end of either link."""
    if shutil.which("ip") is None:
        pytest.skip("no iproute2")
    spaces = {name: f"whl-{os.getpid()}-{name}" for name in NAMES}
    try:
        try:
            for space in spaces.values():
                ip("netns", "add", space)
        except subprocess.CalledProcessError:
            pytest.skip("network namespaces are not permitted here")
        for number, client in enumerate(NAMES[1:], start=1):
            ends = (f"whs{os.getpid() % 100000}{number}", f"whc{os.getpid() % 100000}{number}")
            ip(
                "link",
                "add",
                ends[0],
                "netns",
                spaces["hub"],
                "type",
                "veth",
                "peer",
                "name",
                ends[1],
                "netns",
                spaces[client],
            )
            for space, end, host in ((spaces["hub"], ends[0], 1), (spaces[client], ends[1], 2)):
                ip("-n", space, "address", "add", f"10.77.{number}.{host}/24", "dev", end)
                ip("-n", space, "link", "set", end, "up")
                ip("-n", space, "link", "set", "lo", "up")
            spaces[f"link {client}"] = ends[1]
        yield spaces
    finally:
        for name in NAMES:
            subprocess.run(["ip", "netns", "delete", spaces[name]], capture_output=True)


def within(space: str, *words: str, token: str = "") -> subprocess.Popen[str]:
    command = ["ip", "netns", "exec", space, sys.executable, "-m", "whichlora", *words]
    return subprocess.Popen(command, env={**os.environ, "WHICHLORA_TOKEN": token}, text=True, stderr=subprocess.PIPE)


def test_stores_converge_over_links_that_break(networks: dict[str, str], tmp_path: Path) -> None:
    """What two stores push to a server comes to both, none lost or doubled, though a link is cut within a transfer."""
    served = tmp_path / "hub.duckdb"
    token = Tokens(tokens_path(served)).create(Role.CONTRIBUTOR, "both")
    stores = {name: open_store(tmp_path / f"{name}.duckdb") for name in NAMES[1:]}
    for number, (name, store) in enumerate(stores.items()):
        store.add(measured(name, each, ("rtx-4090", "a100-sxm-80gb")[number]) for each in range(2000))
    hub = within(networks["hub"], "serve", "--db", str(served), "--host", "0.0.0.0", "--jobs", "1")
    try:
        _await(networks["one"], "10.77.1.1")
        slow = (
            "tc",
            "-n",
            networks["one"],
            "qdisc",
            "add",
            "dev",
            networks["link one"],
            "root",
            "tbf",
            "rate",
            "256kbit",
        )
        slowed = subprocess.run([*slow, "burst", "16kb", "latency", "50ms"], capture_output=True).returncode == 0
        pushing = within(
            networks["one"], "profiles", "push", "http://10.77.1.1:8642", "--db", str(stores["one"].path), token=token
        )
        begun = _sent_bytes(networks)
        while pushing.poll() is None and _sent_bytes(networks) < begun + 12_000:
            time.sleep(0.02)
        assert pushing.poll() is None or not slowed  # the pack is on its way
        ip("-n", networks["one"], "link", "set", networks["link one"], "down")
        time.sleep(1.5)
        ip("-n", networks["one"], "link", "set", networks["link one"], "up")
        pushing.wait(120)
        if slowed:
            subprocess.run(
                ["tc", "-n", networks["one"], "qdisc", "del", "dev", networks["link one"], "root"], check=True
            )
        for _ in range(2):
            for number, (name, store) in enumerate(stores.items(), start=1):
                url = f"http://10.77.{number}.1:8642"
                done = within(networks[name], "profiles", "sync", url, "--db", str(store.path), token=token)
                _, said = done.communicate(timeout=120)
                assert done.returncode == 0, said
    finally:
        hub.terminate()
        hub.wait(60)
    ids = [{one.id for one in store.query()} for store in (*stores.values(), open_store(served))]
    assert ids[0] == ids[1] == ids[2]
    assert len(ids[0]) == 4000


def _sent_bytes(networks: dict[str, str]) -> int:
    command = ["ip", "-n", networks["one"], "-s", "-j", "link", "show", "dev", networks["link one"]]
    found = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return int(found[0]["stats64"]["tx"]["bytes"])


def _await(space: str, host: str) -> None:
    ask = f"import socket; socket.create_connection(({host!r}, {PORT}), 1)"
    for _ in range(300):
        if (
            subprocess.run(["ip", "netns", "exec", space, sys.executable, "-c", ask], capture_output=True).returncode
            == 0
        ):
            return
        time.sleep(0.1)
    raise AssertionError("the server does not answer")
