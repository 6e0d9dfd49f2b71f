"""A server over a store of its own, in this process, and one in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from benchmarks.waiting import answers, free_ports, until

pytest.importorskip("fastapi", reason="the server needs the extra `serve`")

from whichlora.serve.tokens import Role, Tokens, tokens_path


@dataclass(frozen=True)
class Running:
    """A server in a process of its own."""

    url: str
    store: Path
    process: subprocess.Popen[bytes]

    def answers(self) -> bool:
        assert self.process.poll() is None, "the server ended"
        return answers(f"{self.url}/health")

    def token(self, role: Role = Role.CONTRIBUTOR, label: str = "tester") -> str:
        return Tokens(tokens_path(self.store)).create(role, label)

    def client(self, role: Role | None = None) -> httpx.Client:
        headers = {} if role is None else {"Authorization": f"Bearer {self.token(role)}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60, trust_env=False)


@contextmanager
def serving(store: Path, *options: str, port: int | None = None) -> Iterator[Running]:
    """Run `whichlora serve` until the block ends; it must then stop by itself on SIGTERM."""
    port = port or free_ports()[0]
    command = [sys.executable, "-m", "whichlora", "serve", "--db", str(store), "--port", str(port), "--jobs", "1"]
    process = subprocess.Popen([*command, "--rate", "0", *options], env={**os.environ}, start_new_session=True)
    try:
        running = Running(f"http://127.0.0.1:{port}", store, process)
        until(running.answers, "the server does not answer")
        yield running
        if process.poll() is None:
            process.terminate()
            assert process.wait(60) == 0
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One server that tests share, which add to its store and take nothing from it."""
    with serving(tmp_path_factory.mktemp("served") / "store.duckdb") as running:
        yield running


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    """Start a server with options of the test's own."""
    from contextlib import ExitStack

    with ExitStack() as stack:
        yield lambda *options: stack.enter_context(serving(tmp_path / "store.duckdb", *options))
