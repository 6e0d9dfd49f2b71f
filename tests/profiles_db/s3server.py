"""A server process that speaks S3, for tests."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator

from benchmarks.waiting import free_ports, until

BUCKET = "lab"


@contextlib.contextmanager
def s3_server() -> Iterator[dict[str, str]]:
    """Start a server with one empty bucket; give the variables that a client of it needs."""
    (port,) = free_ports()
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
        until(lambda: _made_bucket(endpoint), "the server of S3 does not answer")
        yield variables
    finally:
        server.kill()
        server.wait()


def _made_bucket(endpoint: str) -> bool:
    request = urllib.request.Request(f"{endpoint}/{BUCKET}", method="PUT", data=b"")
    try:
        with urllib.request.urlopen(request, timeout=10):
            return True
    except OSError:
        return False
