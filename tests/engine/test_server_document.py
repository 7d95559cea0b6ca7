"""The OpenAPI document: every route is in it, with its errors as they are, and where a key is needed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from served import Running, Setup, refused, served

from quire.serve.auth import PUBLIC


def document(*keys: str) -> dict[str, Any]:
    with served(Setup(keys=keys)) as server:
        return server.http.get("/openapi.json").json()


def test_the_routes_and_their_errors() -> None:
    found = document()
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages", "/tokenize"):
        answers = found["paths"][path]["post"]["responses"]
        assert set(answers) == {"200", "4XX", "5XX"}, "a wrong body is a 400 here, not a 422"
        schema = answers["4XX"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
        assert found["components"]["schemas"][schema]["required"] == ["error"]
    assert "security" not in found


def test_where_a_key_is_needed() -> None:
    found = document("secret")
    assert set(found["components"]["securitySchemes"]) == {"bearer", "x-api-key"} and len(found["security"]) == 2
    for path, operations in found["paths"].items():
        for operation in operations.values():
            assert (operation.get("security") == []) == (path in PUBLIC), path


# -------------------------------------------------------------------- what bodies may hold


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with served(Setup(most_tokens=4)) as running:
        yield running


ROUTES = {"CompletionRequest": "/v1/completions", "ChatRequest": "/v1/chat/completions"}


def bounded(server: Running, body: str) -> dict[str, dict[str, Any]]:
    """The fields of a body that are one number within bounds."""
    properties = server.http.get("/openapi.json").json()["components"]["schemas"][body]["properties"]
    plain = {name: schema["anyOf"][0] if "anyOf" in schema else schema for name, schema in properties.items()}
    return {name: schema for name, schema in plain.items() if {"maximum", "minimum"} & set(schema)}


@pytest.mark.parametrize("body", ROUTES)
def test_bounds_in_the_document_are_those_of_the_server(server: Running, body: str) -> None:
    start = {"messages": [{"role": "user", "content": "x"}]} if body == "ChatRequest" else {"prompt": "x|"}
    start |= {"max_tokens": 1, "logprobs": True if body == "ChatRequest" else 1}
    found = bounded(server, body)
    assert len(found) > 15
    for name, schema in found.items():
        for end, step in (("minimum", -1), ("maximum", 1), ("exclusiveMinimum", 0)):
            if end in schema:
                response = server.http.post(ROUTES[body], json=start | {name: schema[end] + step})
                assert response.status_code == 400, (name, schema[end] + step, response.text)


@pytest.mark.parametrize("name", ["temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "top_k"])
def test_the_ends_themselves_are_allowed(server: Running, name: str) -> None:
    schema = bounded(server, "CompletionRequest")[name]
    for end in ("minimum", "maximum"):
        if end in schema:
            body = {"prompt": "x|", "max_tokens": 1, name: schema[end]}
            assert server.http.post("/v1/completions", json=body).status_code == 200, body


def test_examples_work_as_they_stand(server: Running) -> None:
    found = server.http.get("/openapi.json").json()
    tried = 0
    for path, operations in found["paths"].items():
        if "post" not in operations or "requestBody" not in operations["post"]:
            continue
        name = operations["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
        for example in found["components"]["schemas"][name]["examples"]:
            response = server.http.post(path, json=example)
            assert response.status_code == 200, (path, response.text)
            tried += 1
    assert tried >= 7
    refused(server.http.post("/v1/completions", json={}))
