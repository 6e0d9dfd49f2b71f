"""Two stores and a server, each with a network of its own, converge; also where the link breaks in the midst of a pack."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.waiting import until
from tests import programs
from tests.profiles_db.lab import measured
from whichlora.serve.tokens import Role, Tokens, tokens_path
from whichlora_profiles_db import open_store

PORT = 8642
NAMES = ("hub", "one", "two")


def ip(words: str, *, check: bool = True) -> str:
    """Run a command of ip, whose name may be none of PATH's."""
    command = [programs.find("ip") or "ip", *words.split()]
    return subprocess.run(command, check=check, capture_output=True, text=True).stdout


@pytest.fixture
def networks() -> Iterator[dict[str, str]]:
    """Join three namespaces: a server at 10.77.1.1 and 10.77.2.1, and a client at the other end of either link."""
    if programs.find("ip") is None:
        pytest.skip("no iproute2")
    spaces = {name: f"whl-{os.getpid()}-{name}" for name in NAMES}
    try:
        try:
            for space in spaces.values():
                ip(f"netns add {space}")
        except subprocess.CalledProcessError:
            pytest.skip("network namespaces are not permitted here")
        for number, client in enumerate(NAMES[1:], start=1):
            ends = (f"whs{os.getpid() % 100000}{number}", f"whc{os.getpid() % 100000}{number}")
            ip(f"link add {ends[0]} netns {spaces['hub']} type veth peer name {ends[1]} netns {spaces[client]}")
            for space, end, host in ((spaces["hub"], ends[0], 1), (spaces[client], ends[1], 2)):
                ip(f"-n {space} address add 10.77.{number}.{host}/24 dev {end}")
                ip(f"-n {space} link set {end} up")
                ip(f"-n {space} link set lo up")
            spaces[f"link {client}"] = ends[1]
        yield spaces
    finally:
        for name in NAMES:
            ip(f"netns delete {spaces[name]}", check=False)


def inside(space: str, *words: str) -> list[str]:
    """Return the command that runs our Python in a namespace."""
    return [programs.find("ip") or "ip", "netns", "exec", space, sys.executable, *words]


def within(space: str, *words: str, token: str = "") -> subprocess.Popen[str]:
    variables = {**os.environ, "WHICHLORA_TOKEN": token}
    command = inside(space, "-m", "whichlora", *words)
    return subprocess.Popen(command, env=variables, text=True, stderr=subprocess.PIPE)


def slowed(space: str, link: str) -> bool:
    """Slow a link down, so that a transfer takes a while; say whether that could be done here."""
    tc = programs.find("tc")
    words = f"-n {space} qdisc add dev {link} root tbf rate 256kbit burst 16kb latency 50ms"
    return tc is not None and subprocess.run([tc, *words.split()], capture_output=True).returncode == 0


def sent_bytes(space: str, link: str) -> int:
    (found,) = json.loads(ip(f"-n {space} -s -j link show dev {link}"))
    return int(found["stats64"]["tx"]["bytes"])


def answers(space: str, host: str) -> bool:
    ask = f"import socket; socket.create_connection(({host!r}, {PORT}), 1)"
    return subprocess.run(inside(space, "-c", ask), capture_output=True).returncode == 0


def test_stores_converge_over_links_that_break(networks: dict[str, str], tmp_path: Path) -> None:
    """What two stores push to a server comes to both, none lost or doubled, though a link is cut within a transfer."""
    served = tmp_path / "hub.duckdb"
    token = Tokens(tokens_path(served)).create(Role.CONTRIBUTOR, "both")
    stores = {name: open_store(tmp_path / f"{name}.duckdb") for name in NAMES[1:]}
    for number, (name, store) in enumerate(stores.items()):
        store.add(measured(name, each, ("rtx-4090", "a100-sxm-80gb")[number]) for each in range(2000))
    space, link = networks["one"], networks["link one"]
    hub = within(networks["hub"], "serve", "--db", str(served), "--host", "0.0.0.0", "--jobs", "1")
    try:
        until(lambda: answers(space, "10.77.1.1"), "the server does not answer")
        slow = slowed(space, link)
        push = ("profiles", "push", f"http://10.77.1.1:{PORT}", "--db", str(stores["one"].path))
        pushing, begun = within(space, *push, token=token), sent_bytes(space, link)
        while pushing.poll() is None and sent_bytes(space, link) < begun + 12_000:
            time.sleep(0.02)
        assert pushing.poll() is None or not slow  # the pack is on its way
        ip(f"-n {space} link set {link} down")
        time.sleep(1.5)
        ip(f"-n {space} link set {link} up")
        pushing.wait(120)
        if slow:
            subprocess.run([str(programs.find("tc")), *f"-n {space} qdisc del dev {link} root".split()], check=True)
        for _ in range(2):
            for number, (name, store) in enumerate(stores.items(), start=1):
                url = f"http://10.77.{number}.1:{PORT}"
                done = within(networks[name], "profiles", "sync", url, "--db", str(store.path), token=token)
                _, said = done.communicate(timeout=120)
                assert done.returncode == 0, said
    finally:
        hub.terminate()
        hub.wait(60)
    ids = [{one.id for one in store.query()} for store in (*stores.values(), open_store(served))]
    assert ids[0] == ids[1] == ids[2]
    assert len(ids[0]) == 4000
