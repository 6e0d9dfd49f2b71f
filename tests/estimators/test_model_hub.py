"""Names of models that nobody here knows: what is suggested, and what the Hub answers, or does not."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from whichlora_estimators.errors import UnknownName, WhichloraError
from whichlora_estimators.models import load_model

from .small import SMALL


@pytest.mark.parametrize(
    ("written", "near"), [("lama-2-7b-hf", "Llama-2-7b-hf"), ("gtp2", "gpt2"), ("mistal-7b-v0.3", "mistral-7b-v0.3")]
)
def test_an_unknown_name_suggests_one_that_works(written: str, near: str) -> None:
    """The nearest names of an unknown one are known, and the one that was meant is among them."""
    with pytest.raises(UnknownName) as caught:
        load_model(written)
    assert near.casefold() in map(str.casefold, caught.value.nearest)
    for name in caught.value.nearest:
        assert load_model(name, offline=True)


REVISION = "0123456789abcdef0123456789abcdef01234567"
REPOSITORIES = {
    "lab/good": (200, json.dumps(SMALL), None),
    "lab/list": (200, "[]", None),
    "lab/locked": (403, "", "GatedRepo"),
    "lab/missing": (404, "", "RepoNotFound"),
    "lab/adapter": (404, "", "EntryNotFound"),
    "lab/refused": (400, "", None),
    "lab/broken": (200, json.dumps(SMALL), None),
}


class HubHandler(http.server.BaseHTTPRequestHandler):
    """Answers for config.json as the Hub does, headers included."""

    requests = 0

    def do_GET(self) -> None:
        type(self).requests += 1
        name = "/".join(self.path.split("/")[1:3])
        status, body, code = REPOSITORIES.get(name, (404, "", None))
        if (name, self.command) == ("lab/broken", "GET"):
            status = 400
        self.send_response(status)
        headers = {"Content-Length": str(len(body)), "ETag": '"abc"', "X-Repo-Commit": REVISION, "X-Error-Code": code}
        for header, value in headers.items():
            if value is not None:
                self.send_header(header, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body.encode())

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), HubHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


PROGRAM = """
import json, sys, time
from whichlora_estimators.errors import WhichloraError
from whichlora_estimators.models import load_model

time.sleep = lambda seconds: None  # the client waits between its attempts
for name in sys.argv[1:]:
    try:
        shape = load_model(name)
        print(json.dumps([shape.name, shape.config, shape.source]))
    except WhichloraError as error:
        print(json.dumps([type(error).__name__, str(error)]))
"""


def ask(names: list[str], home: Path, **environment: str) -> list[Any]:
    """Load each name in a fresh interpreter: the Hub's client reads its environment when it is imported."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    env = (
        inherited
        | {"HF_HOME": str(home), "NO_PROXY": "127.0.0.1", "PYTHONPATH": os.pathsep.join(sys.path)}
        | environment
    )
    done = subprocess.run([sys.executable, "-c", PROGRAM, *names], env=env, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_the_hub_is_asked_for_what_nobody_else_knows(hub: str, tmp_path: Path) -> None:
    """A config.json is downloaded once and then found offline; every refusal of the Hub has its own message."""
    names = list(REPOSITORIES)
    good, listed, locked, missing, adapter, refused, broken = ask(names, tmp_path, HF_ENDPOINT=hub)
    assert good == ["lab/good", SMALL, f"config.json on the Hub, commit {REVISION[:12]}"]
    assert listed[0] == "BadValue"
    assert "gated" in locked[1]
    assert "Accept its licence" in locked[1]
    assert "HF_TOKEN" in locked[1]
    assert missing[0] == "UnknownName"
    assert "no config.json in this repository" in adapter[1]
    assert "asking the Hub failed" in refused[1]
    assert "did not answer" in broken[1]
    assert ask(["lab/good"], tmp_path, HF_ENDPOINT=hub, HF_HUB_OFFLINE="1")[0] == good
    asked = HubHandler.requests
    assert ask(["lab/good"], tmp_path, HF_ENDPOINT=hub)[0] == good
    assert HubHandler.requests == asked, "what is cached needs no network"


def test_offline_says_so_and_names_the_nearest(tmp_path: Path) -> None:
    """With HF_HUB_OFFLINE=1 an unknown model is refused at once, with known names like it."""
    [(kind, message)] = ask(["lab/Llama-2-7b-hf"], tmp_path, HF_HUB_OFFLINE="1")
    assert kind == "WhichloraError"
    assert "offline" in message
    assert "Llama-2-7b-hf" in message.partition("include")[2]


def test_a_hub_out_of_reach_says_so(tmp_path: Path) -> None:
    """Where nobody listens, the error says that the Hub cannot be reached and what would help."""
    [(kind, message)] = ask(["lab/unheard-of"], tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert kind == "WhichloraError"
    assert "asking the Hub failed" in message
    assert "Models known without a download include" in message


@pytest.mark.parametrize("name", ["what is/this", "lab/..", "lab/-x-"])
def test_a_name_that_the_hub_cannot_have_is_unknown(name: str) -> None:
    """An id that the Hub's client rejects by its form is an unknown model."""
    with pytest.raises(UnknownName):
        load_model(name)


def test_the_offline_argument_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """offline=True refuses an unknown model without any environment variable."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(WhichloraError, match="offline"):
        load_model("lab/never-downloaded-by-anybody", offline=True)
