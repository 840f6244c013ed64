"""Description of the server's API: OpenAPI, and a page that loads nothing from other hosts."""

from __future__ import annotations

import html
import json
from typing import Any

import msgspec

from tron_cli.serving.requests import (
    DEFAULT_K,
    DEFAULT_SIMILAR,
    Failure,
    Recommendations,
    Recommended,
    RecommendRequest,
    SimilarRequest,
)
from tron_cli.serving.settings import ServerSettings

_STRUCTS = (RecommendRequest, SimilarRequest, Recommended, Recommendations, Failure)
_FAILURES = {
    "400": "The request is not as described here.",
    "408": "The request did not arrive in time.",
    "413": "The body is too large.",
    "415": "The content type is not application/json.",
    "422": "The model cannot answer, for example because it does not know an item.",
    "500": "The model failed.",
    "503": "Too many requests wait, the model did not answer in time, or the server is stopping.",
}
_MEANING = {
    "items": "Item ids of one history, oldest first.",
    "histories": "Several histories, instead of items.",
    "k": "Number of items to return.",
    "filter_rated": "Leave out items of the history; null: as the checkpoint was evaluated.",
    "exclude": "Item ids that are not to be recommended.",
    "candidates": "Rank only these items of the catalogue.",
    "item": "The item that the others are compared with.",
}


def description(num_items: int, settings: ServerSettings) -> dict[str, Any]:
    """Return the OpenAPI 3.1 description, with the server's limits."""
    _, schemas = msgspec.json.schema_components(
        _STRUCTS, ref_template="#/components/schemas/{name}"
    )
    for name, default in (("RecommendRequest", DEFAULT_K), ("SimilarRequest", DEFAULT_SIMILAR)):
        highest = min(settings.max_k, num_items)
        properties = schemas[name]["properties"]
        properties["k"] |= {"minimum": 1, "maximum": highest, "default": min(default, highest)}
        for field in properties:
            properties[field]["description"] = _MEANING[field]
    recommend = schemas["RecommendRequest"]
    history = {"maxItems": settings.max_history}
    recommend["properties"]["items"] |= history
    recommend["properties"]["histories"]["items"] |= history
    recommend["properties"]["histories"]["maxItems"] = settings.max_histories
    recommend["oneOf"] = [{"required": ["items"]}, {"required": ["histories"]}]
    recommend["examples"] = [{"items": ["a", "b"], "k": 10}]
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "tron",
            "version": "1",  # of this interface
            "description": "Recommendations for histories of item ids.",
        },
        "paths": {
            "/recommend": _post(
                "Recommend items for one history, or for several.",
                "RecommendRequest",
                {"anyOf": [_reference("Recommended"), _reference("Recommendations")]},
            ),
            "/similar": _post(
                "Return the items most similar to an item.",
                "SimilarRequest",
                _reference("Recommended"),
            ),
            "/health": _get("Answer while the process lives.", "application/json"),
            "/ready": _get(
                "Name the checkpoint that is served.",
                "application/json",
                **{"503": "The server is stopping."},
            ),
            "/metrics": _get("Return metrics in the text format of Prometheus.", "text/plain"),
            "/openapi.json": _get("Return this description.", "application/json"),
            "/docs": _get("Return this description as a page.", "text/html"),
        },
        "components": {"schemas": schemas},
    }


def page(described: dict[str, Any]) -> str:
    """Return HTML without scripts, pictures or links to other hosts."""
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>tron</title>"
        "<style>body{font:16px sans-serif;max-width:50em;margin:2em auto;padding:0 1em}"
        "pre{background:#f4f4f4;padding:1em;overflow:auto}</style>"
        f"<h1>tron</h1>"
        f"<p>{html.escape(described['info']['description'])} "
        "As OpenAPI: <a href='/openapi.json'>/openapi.json</a>.</p>"
    ]
    for path, methods in described["paths"].items():
        for method, operation in methods.items():
            parts.append(f"<h2>{method.upper()} {html.escape(path)}</h2>")
            parts.append(f"<p>{html.escape(operation['summary'])}</p><ul>")
            for status, answer in operation["responses"].items():
                parts.append(f"<li>{status}: {html.escape(answer['description'])}</li>")
            parts.append("</ul>")
    for name, schema in described["components"]["schemas"].items():
        shown = html.escape(json.dumps(schema, indent=2))
        parts.append(f"<h2>{name}</h2><pre>{shown}</pre>")
    return "".join(parts)


def _reference(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _post(summary: str, body: str, answer: dict[str, Any]) -> dict[str, Any]:
    answers: dict[str, Any] = {"200": {"description": "OK", "content": _json(answer)}}
    for status, meaning in _FAILURES.items():
        answers[status] = {"description": meaning, "content": _json(_reference("Failure"))}
    request = {"required": True, "content": _json(_reference(body))}
    return {"post": {"summary": summary, "requestBody": request, "responses": answers}}


def _get(summary: str, kind: str, **failures: str) -> dict[str, Any]:
    answers: dict[str, Any] = {"200": {"description": "OK", "content": {kind: {}}}}
    for status, meaning in failures.items():
        answers[status] = {"description": meaning, "content": {kind: {}}}
    return {"get": {"summary": summary, "responses": answers}}
