"""Requests drawn from the server's own OpenAPI description, valid and invalid ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from helpers.servers import HOST, FakeRecommender, running_server
from hypothesis import HealthCheck, assume, given, settings
from schemathesis import Case, GenerationMode

PATHS = ["/recommend", "/similar", "/health", "/ready", "/metrics", "/docs"]


@pytest.fixture(scope="module")
def schema() -> Iterator[Any]:
    with running_server(FakeRecommender(), max_history=20, max_histories=4) as server:
        schema = schemathesis.openapi.from_url(f"http://{HOST}:{server.port}/openapi.json")
        # No item of the fake's catalogue is likely to be drawn.
        schema.config.checks.positive_data_acceptance.expected_statuses = ["200", "422"]
        yield schema


def has_float(value: Any) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return isinstance(value, float) or any(map(has_float, inner))


def test_every_path_is_described(schema: Any) -> None:
    assert [operation.ok().path for operation in schema.get_all_operations()] == PATHS


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
@pytest.mark.parametrize("path", PATHS)
def test_drawn_requests_are_answered_as_described(
    schema: Any, path: str, mode: GenerationMode
) -> None:
    """Valid ones are answered and invalid ones refused, with a described status and form."""
    method = "POST" if path in PATHS[:2] else "GET"
    if method == "GET" and mode is GenerationMode.NEGATIVE:
        return  # without parameters nothing can be wrong

    @settings(
        max_examples=50, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(case=schema[path][method].as_strategy(generation_mode=mode))
    def check(case: Case) -> None:
        assume(not has_float(case.body))  # 1.0 is an integer to JSON Schema, and is refused
        case.call_and_validate()

    check()
