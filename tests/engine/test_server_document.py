"""The OpenAPI document: every route is in it, with its errors as they are, and where a key is needed."""

from __future__ import annotations

from typing import Any

from served import Setup, served

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
