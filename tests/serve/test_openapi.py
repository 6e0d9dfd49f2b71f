"""Whatever the OpenAPI description allows, and much that it does not, is answered as it says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from whichlora.serve.tokens import Role

from .conftest import Running, serving

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis draws requests")
from hypothesis import HealthCheck, settings  # noqa: E402


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(tmp_path_factory.mktemp("drawn") / "store.duckdb") as found:
        yield found


@pytest.fixture(scope="module")
def token(running: Running) -> str:
    return running.token(Role.ADMIN)


@pytest.fixture(scope="module")
def api(running: Running) -> Any:
    return schemathesis.openapi.from_url(f"{running.url}/openapi.json")


# Searches take minutes each: what they refuse is drawn in test_server.py.
schema = schemathesis.pytest.from_fixture("api").exclude(path="/v1/picks", method="POST")


@schema.parametrize()
@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
def test_answers_are_as_described(case: Any, token: str) -> None:
    """No request makes a server error or an answer that is not described."""
    unknown_names = schemathesis.checks.load_all_checks() or schemathesis.checks.CHECKS.get_by_names(
        ["positive_data_acceptance"]
    )
    case.call_and_validate(headers={"Authorization": f"Bearer {token}"}, excluded_checks=unknown_names, timeout=60)


def test_every_operation_is_described(running: Running) -> None:
    """Each operation has a summary, and each that takes a body an example of it."""
    with running.client() as client:
        described = client.get("/openapi.json").json()
    for path, operations in described["paths"].items():
        for method, operation in operations.items():
            assert operation["description"], (method, path)
            content = operation.get("requestBody", {}).get("content", {}).get("application/json")
            if content:
                name = content["schema"]["$ref"].rsplit("/", 1)[1]
                assert described["components"]["schemas"][name].get("examples") or path == "/v1/measurements", path
