"""The form of an output over HTTP: what reaches the engine, and what is refused. The model itself is a parrot."""

from __future__ import annotations

import json
from typing import Any

import pytest
from served import Running, refused

from quire.core.structured import StructuredOutputsParams

BODY = {"prompt": "say:hello;|", "messages": [{"role": "user", "content": "say:hello;"}]}
PATHS = ("/v1/completions", "/v1/chat/completions")
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
TAG = {
    "type": "structural_tag",
    "format": {"type": "tag", "begin": "<a>", "content": {"type": "json_schema", "json_schema": SCHEMA}, "end": "</a>"},
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("fields", "form"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, {"json_object": True}),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": SCHEMA, "strict": True},
                }
            },
            {"json": SCHEMA},
        ),
        ({"response_format": {"type": "json_schema", "name": "x", "schema": SCHEMA}}, {"json": SCHEMA}),
        ({"response_format": {"type": "json_object", "schema": SCHEMA}}, {"json": SCHEMA}),
        ({"structured_outputs": {"regex": "[a-z]+", "json": None}}, {"regex": "[a-z]+"}),
        ({"structured_outputs": {"choice": ["a", "b"]}}, {"choice": ["a", "b"]}),
        ({"structured_outputs": {"json": "{}", "disable_any_whitespace": True}}, {"json": "{}"}),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, {"grammar": 'start: "a"'}),
        ({"response_format": TAG}, {"structural_tag": TAG}),
        ({"structured_outputs": {"structural_tag": TAG}}, {"structural_tag": TAG}),
        ({"guided_json": SCHEMA, "guided_decoding_backend": "outlines"}, {"json": SCHEMA}),
        ({"guided_json": json.dumps(SCHEMA), "guided_regex": None}, {"json": SCHEMA}),
        ({"guided_regex": "[a-z]+"}, {"regex": "[a-z]+"}),
        ({"guided_choice": ["a", "b"]}, {"choice": ["a", "b"]}),
        ({"guided_grammar": 'start: "a"'}, {"grammar": 'start: "a"'}),
        ({"guided_json_object": True}, {"json_object": True}),
    ],
)
def test_the_form_reaches_the_engine(
    server: Running, path: str, fields: dict[str, Any], form: dict[str, Any] | None
) -> None:
    assert server.http.post(path, json=BODY | fields).is_success
    admitted = [new for plan in server.executor.plans for new in plan.admitted]
    found = admitted[-1].params.structured_outputs
    if form is None:
        assert found is None
    else:
        compact = bool(fields.get("structured_outputs", {}).get("disable_any_whitespace"))
        assert found == StructuredOutputsParams(**form, disable_any_whitespace=compact)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema.schema"),
        ({"response_format": {"type": "structural_tag"}}, "response_format", "structures and triggers"),
        ({"response_format": {"type": "poem"}}, "response_format", "structural_tag"),
        ({"structured_outputs": {"regex": "a", "after": {}}}, "structured_outputs", "after"),
        ({"response_format": {}}, "response_format", "found no type"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}},
            "response_format",
            "response_format cannot be used: no grammar",
        ),
        ({"response_format": {"type": "json_object", "schema": "{}"}}, "response_format", "an object"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {"regexp": "a"}}, "regexp", "regex"),
        ({"structured_outputs": {"regex": "(?=a)b"}}, "structured_outputs", "look-around"),
        ({"structured_outputs": {"json": {"type": "array", "uniqueItems": True}}}, "structured_outputs", "uniqueItems"),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "structured_outputs",
            "exclude",
        ),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex", "exclude"),
        ({"guided_regex": "a", "structured_outputs": {"regex": "a"}}, "structured_outputs", "guided_regex"),
        ({"guided_regex": "a", "guided_json": {}}, "structured_outputs", "exactly one"),
        ({"guided_regex": "(?=a)b"}, "structured_outputs", "look-around"),
    ],
)
def test_what_is_refused(server: Running, path: str, fields: dict[str, Any], param: str, said: str) -> None:
    error = refused(server.http.post(path, json=BODY | fields))
    assert error["param"] == param and said in error["message"]
    assert server.http.post(path, json=BODY).is_success
