"""Data sets of the Hub: from its cache without a network, absent ones, gated ones, by the real library `datasets`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("datasets", reason="the Hub's data sets are read by `datasets`")
pytestmark = pytest.mark.stack
COMMAND = [sys.executable, "-c", "from whichlora.cli import main; main()", "data"]
MODEL = ["--model", "meta-llama/Llama-3.1-8B"]


class _Gated(BaseHTTPRequestHandler):
    """A Hub on which everything is gated, and the reader is nobody."""

    def do_GET(self) -> None:
        self.send_response(401)
        self.send_header("X-Error-Code", "GatedRepo")
        self.send_header("X-Error-Message", "Access to this data set is restricted.")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self.do_GET()

    def log_message(self, *said: Any) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Gated)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def cached(home: Path, name: str, rows: list[dict[str, str]], *, readme: bool) -> None:
    """Put a data set into the Hub's cache as a download leaves it."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    repository, commit = home / "hub" / f"datasets--{name.replace('/', '--')}", "0123456789" * 4
    files = repository / "snapshots" / commit / "data"
    files.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit, encoding="utf-8")
    if readme:
        (files.parent / "README.md").write_text("---\nlicense: mit\n---\n", encoding="utf-8")
    for split, some in (("train", rows), ("validation", rows[:3]), ("test", rows[:2])):
        parquet.write_table(arrow.Table.from_pylist(some), files / f"{split}-00000-of-00001.parquet")


def run(home: Path, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    paths = {"HF_HOME": str(home), "WHICHLORA_CACHE_DIR": str(home / "cache")}
    paths["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    known = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return subprocess.run(
        [*COMMAND, *words, *MODEL], env=known | paths | more, capture_output=True, text=True, timeout=200
    )


@pytest.mark.parametrize("readme", [True, False])
def test_a_cached_data_set_needs_no_network(readme: bool, tmp_path: Path) -> None:
    """All of its splits are found with --offline; a split that it lacks is refused by name."""
    rows = [{"question": f"What is {n}?", "answer": f"The number {n}."} for n in range(20)]
    cached(tmp_path, "lab/numbers", rows, readme=readme)
    found = run(tmp_path, "lab/numbers", "--offline", "--json")
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["samples"] == {"train": 20, "validation": 3, "test": 2}
    missing = run(tmp_path, "lab/numbers", "--offline", "--subset", "nowhere")
    assert missing.returncode == 2
    assert "lab/numbers" in missing.stderr
    assert "nowhere" in missing.stderr


def test_an_absent_data_set_is_told_at_once(tmp_path: Path) -> None:
    """With --offline nothing is asked: exit status 2, the name, and what to do."""
    found = run(tmp_path, "lab/nothing", "--offline")
    assert found.returncode == 2
    assert "lab/nothing" in found.stderr
    assert "leave out --offline" in found.stderr
    assert "Traceback" not in found.stderr


def test_a_gated_data_set_says_so(tmp_path: Path, hub: str) -> None:
    """A Hub that refuses access ends in exit status 2, and the message says that it is gated."""
    found = run(tmp_path, "lab/secret", HF_ENDPOINT=hub)
    assert found.returncode == 2, found.stderr
    assert "gated" in found.stderr
    assert "hf auth login" in found.stderr
    assert "Traceback" not in found.stderr
