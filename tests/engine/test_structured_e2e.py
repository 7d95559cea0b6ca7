"""Tools from end to end: the real server with the bundled model, which was taught to call them, and the openai client."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from started_server import started_server

pytestmark = pytest.mark.slow


def tool(name: str, description: str, **parameters: str) -> dict[str, Any]:
    schema = {
        "type": "object",
        "properties": {key: {"type": kind} for key, kind in parameters.items()},
        "required": list(parameters),
    }
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


WEATHER = tool("get_weather", "The weather in a city.", city="string")
ADD = tool("add", "The sum of two numbers.", a="integer", b="integer")
QUESTION = [{"role": "user", "content": "What is the weather in Paris?"}]


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    arguments = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes")
    with started_server(*arguments, rows=8, threads=1) as server:
        yield openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=120)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0


def asked(client: openai.OpenAI, **fields: Any) -> Any:
    model = client.models.list().data[0].id
    request = {"model": model, "messages": QUESTION, "tools": [WEATHER, ADD], "temperature": 0, "max_tokens": 80}
    return client.chat.completions.create(**request | fields)


def test_the_model_calls_a_tool_and_reads_its_answer(client: openai.OpenAI) -> None:
    choice = asked(client).choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    call = choice.message.tool_calls[0]
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Paris"})
    answer = {"role": "tool", "tool_call_id": call.id, "content": '{"sky": "rainy", "degrees": 12}'}
    message = choice.message.model_dump(exclude_none=True)
    told = asked(client, messages=[*QUESTION, message, answer]).choices[0]
    assert told.finish_reason == "stop" and "12 degrees" in told.message.content


def test_the_same_in_a_stream(client: openai.OpenAI) -> None:
    name, arguments, reason = "", "", None
    for chunk in asked(client, stream=True):
        for call in chunk.choices[0].delta.tool_calls or []:
            name += call.function.name or ""
            arguments += call.function.arguments
        reason = chunk.choices[0].finish_reason or reason
    assert (name, json.loads(arguments), reason) == ("get_weather", {"city": "Paris"}, "tool_calls")


def test_a_strict_tool_may_be_called_freely(client: openai.OpenAI) -> None:
    strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
    choice = asked(client, tools=[strict, ADD], tool_choice="auto").choices[0]
    [call] = choice.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Paris"})
    assert choice.finish_reason == "tool_calls"


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_can_be_forced(client: openai.OpenAI, stream: bool) -> None:
    """Asked about the weather, the model must add, and its arguments keep to the schema at any temperature."""
    wish = {"type": "function", "function": {"name": "add"}}
    for seed in range(5):
        found = asked(client, tool_choice=wish, temperature=1.3, seed=seed, stream=stream)
        if stream:
            calls = [call for chunk in found for call in chunk.choices[0].delta.tool_calls or []]
        else:
            assert found.choices[0].finish_reason == "stop"
            calls = found.choices[0].message.tool_calls
        # In a stream the first piece has the name, and all have more of the arguments.
        assert [call.function.name for call in calls if call.function.name] == ["add"]
        assert len(calls) == 1 or stream
        values = json.loads("".join(call.function.arguments for call in calls))
        assert set(values) == {"a", "b"} and all(type(value) is int for value in values.values())


def test_some_call_can_be_required(client: openai.OpenAI) -> None:
    hello = [{"role": "user", "content": "Tell me a tale."}]
    choice = asked(client, messages=hello, tool_choice="required", parallel_tool_calls=False).choices[0]
    assert choice.finish_reason == "tool_calls" and len(choice.message.tool_calls) == 1
    assert choice.message.tool_calls[0].function.name in ("get_weather", "add")


def test_no_tools_no_calls(client: openai.OpenAI) -> None:
    choice = asked(client, tool_choice="none").choices[0]
    assert not choice.message.tool_calls and "<tool_call>" in choice.message.content


def test_an_answer_in_the_form_of_a_schema(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}, "warm": {"type": "boolean"}},
        "required": ["city", "warm"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "weather", "schema": schema, "strict": True}}
    answer = asked(client, tools=openai.NOT_GIVEN, response_format=form).choices[0]
    found = json.loads(answer.message.content)
    assert set(found) == {"city", "warm"} and isinstance(found["warm"], bool)
