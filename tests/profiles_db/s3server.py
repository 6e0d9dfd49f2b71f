"""A server process that speaks S3, for tests."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator

BUCKET = "lab"


@contextlib.contextmanager
def s3_server() -> Iterator[dict[str, str]]:
    """Start a server with one empty bucket; give the variables that a client of it needs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    endpoint = f"http://127.0.0.1:{port}"
    variables = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    code = "from moto.server import main; main()"
    server = subprocess.Popen(
        [sys.executable, "-c", code, "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | variables,
    )
    try:
        _make_bucket(endpoint)
        yield variables
    finally:
        server.kill()
        server.wait()


def _make_bucket(endpoint: str) -> None:
    end_s = time.monotonic() + 60
    while True:
        request = urllib.request.Request(f"{endpoint}/{BUCKET}", method="PUT", data=b"")
        try:
            with urllib.request.urlopen(request, timeout=10):
                return
        except OSError:
            if time.monotonic() > end_s:
                raise
            time.sleep(0.1)
