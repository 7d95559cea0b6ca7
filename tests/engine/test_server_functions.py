"""functions and function_call of chat completions: the old form of tools, in requests and in answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from served import Running, Setup, refused, served

from quire.config import ServeOptions

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"name": "get_weather", "description": "Of a city.", "parameters": CITY}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with served(Setup(ServeOptions(tool_call_parser="hermes"))) as running:
        yield running


def body(says: str, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"say:{says};"}]
    return {"model": "parrot", "messages": messages, "functions": [WEATHER], "max_tokens": 200} | fields


def test_a_call_in_the_old_form(server: Running) -> None:
    [choice] = server.client.chat.completions.create(**body(CALL)).choices
    assert choice.finish_reason == "function_call" and choice.message.tool_calls is None
    assert choice.message.function_call.name == "get_weather" and choice.message.content is None
    assert json.loads(choice.message.function_call.arguments) == {"city": "Oslo"}
    [plain] = server.client.chat.completions.create(**body("no call")).choices
    assert plain.finish_reason == "stop" and plain.message.function_call is None and plain.message.content == "no call"


def test_a_call_in_a_stream(server: Running) -> None:
    name, arguments, reasons = "", "", []
    for chunk in server.client.chat.completions.create(stream=True, **body(CALL)):
        [choice] = chunk.choices
        assert choice.delta.tool_calls is None
        reasons.append(choice.finish_reason)
        if choice.delta.function_call is not None:
            name += choice.delta.function_call.name or ""
            arguments += choice.delta.function_call.arguments or ""
    assert name == "get_weather" and json.loads(arguments) == {"city": "Oslo"} and reasons[-1] == "function_call"


def test_the_named_function_is_called(server: Running) -> None:
    request = body(CALL, function_call={"name": "get_weather"})
    [choice] = server.client.chat.completions.create(**request).choices
    assert choice.message.function_call.name == "get_weather"
    assert set(json.loads(choice.message.function_call.arguments)) == {"city"}


def test_calls_and_results_go_back(server: Running) -> None:
    """The model reads the same as with tools."""
    call = {"name": "get_weather", "arguments": '{"city": "Oslo"}'}
    old = [
        {"role": "assistant", "content": None, "function_call": call},
        {"role": "function", "name": "get_weather", "content": "rain"},
    ]
    new = [
        {"role": "assistant", "tool_calls": [{"id": "call_1", "type": "function", "function": call}]},
        {"role": "tool", "name": "get_weather", "content": "rain", "tool_call_id": "call_1"},
    ]
    last = [{"role": "user", "content": "say:wet;"}]
    found = []
    for fields in (
        {"messages": old + last, "functions": [WEATHER]},
        {"messages": new + last, "tools": [{"type": "function", "function": WEATHER}]},
    ):
        request = {"model": "parrot", "return_prompt_text": True} | fields
        answer = server.http.post("/v1/chat/completions", json=request).json()
        assert answer["choices"][0]["message"]["content"] == "wet"
        found.append(answer["prompt_text"])
    assert found[0] == found[1] and "rain" in found[0]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"functions": []}, "functions"),
        ({"tools": [{"type": "function", "function": WEATHER}]}, "functions"),
        ({"tool_choice": "auto"}, "functions"),
        ({"function_call": "always"}, "function_call"),
        ({"function_call": {}}, "function_call"),
        ({"functions": None, "function_call": "auto"}, "function_call"),
        ({"messages": [{"role": "assistant", "function_call": {"name": "f"}}]}, "messages[0].function_call"),
    ],
)
def test_what_makes_no_sense(server: Running, fields: dict[str, Any], param: str) -> None:
    error = refused(server.http.post("/v1/chat/completions", json=body("x", **fields)))
    assert error["param"] == param
