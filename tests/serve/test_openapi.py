"""Whatever the OpenAPI description allows, and much that it does not, is answered as it says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from whichlora.serve.tokens import Role

from .conftest import Running, serving

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis draws requests")

# Searches take minutes each, and what they refuse is drawn in test_server.py.
_LEFT_OUT = {("POST", "/v1/picks")}
_EXAMPLES = 8


@schemathesis.serializer("application/vnd.apache.parquet")  # type: ignore[untyped-decorator]
def as_bytes(_: Any, value: Any) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode(errors="replace")


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(tmp_path_factory.mktemp("drawn") / "store.duckdb") as found:
        yield found


def checks() -> list[Any]:
    """Return all checks, but the one for which every drawn name would have to be a known one."""
    from schemathesis.checks import CHECKS, load_all_checks

    load_all_checks()
    left_out = ("positive_data_acceptance",)
    return CHECKS.get_by_names([name for name in CHECKS.get_all_names() if name not in left_out])


@pytest.mark.parametrize("mode", ["POSITIVE", "NEGATIVE"])
def test_answers_are_as_described(running: Running, mode: str) -> None:
    """No request makes a server error or an answer that is not described."""
    schema = schemathesis.openapi.from_url(f"{running.url}/openapi.json")
    headers = {"Authorization": f"Bearer {running.token(Role.ADMIN)}"}
    chosen = checks()
    drawn = 0
    for result in schema.get_all_operations():
        operation = result.ok()
        if (operation.method.upper(), operation.path) in _LEFT_OUT:
            continue
        drawn += _draw(operation, getattr(schemathesis.GenerationMode, mode), headers, chosen)
    assert drawn > 100


def _draw(operation: Any, mode: Any, headers: dict[str, str], chosen: list[Any]) -> int:
    """Send drawn requests of one operation; return how many."""
    from hypothesis.errors import Unsatisfiable

    count = 0

    @settings(
        max_examples=_EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def send(case: Any) -> None:
        nonlocal count
        count += 1
        case.call_and_validate(headers=headers, checks=chosen, timeout=60)

    try:
        send()
    except Unsatisfiable:  # an operation without input has no wrong input
        assert mode == schemathesis.GenerationMode.NEGATIVE
    return count


def test_every_operation_is_described(running: Running) -> None:
    """Each operation has a description, and each that takes a body an example of it."""
    with running.client() as client:
        described = client.get("/openapi.json").json()
    for path, operations in described["paths"].items():
        for method, operation in operations.items():
            assert operation["description"], (method, path)
            content = operation.get("requestBody", {}).get("content", {}).get("application/json")
            if content:
                name = content["schema"]["$ref"].rsplit("/", 1)[1]
                assert described["components"]["schemas"][name].get("examples"), path
