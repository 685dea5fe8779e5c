"""The published document describes the server: requests that schemathesis makes from it get valid answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings

schemathesis = pytest.importorskip("schemathesis")
standard = pytest.importorskip("schemathesis.specs.openapi.checks")
CHECKS = [
    schemathesis.checks.not_a_server_error,
    standard.status_code_conformance,
    standard.content_type_conformance,
    standard.response_schema_conformance,
]


@pytest.fixture(scope="module")
def patient(local: Callable[..., Any]) -> Iterator[str]:
    """A server whose answers are short, since requests seldom name a limit."""
    with local(default_tokens=4, max_tokens=16) as url:
        yield url


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode), ids=lambda mode: mode.name.lower())
def test_no_request_finds_a_crash(patient: str, mode: Any) -> None:
    schema = schemathesis.openapi.from_url(f"{patient}/openapi.json")
    operations = [operation.ok() for operation in schema.get_all_operations()]
    assert len(operations) == 15
    if mode is schemathesis.GenerationMode.NEGATIVE:  # without a body nothing can be wrong
        operations = [operation for operation in operations if operation.method == "post"]
    for operation in operations:

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(max_examples=30, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
        def check(case: Any) -> None:
            case.call_and_validate(checks=CHECKS, timeout=60)

        check()


def test_the_document(patient: str) -> None:
    document = httpx.get(f"{patient}/openapi.json").json()
    assert document["openapi"].startswith("3.1")
    assert set(document["paths"]) >= {"/v1/chat/completions", "/v1/completions", "/v1/models", "/health"}
    chat_request = document["components"]["schemas"]["ChatRequest"]
    assert chat_request["additionalProperties"] is False
    assert "messages" in chat_request["required"]
