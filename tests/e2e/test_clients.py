"""Every feature of the `openai` and `anthropic` packages that a text server can have, over HTTP and the bundled model.

A test for each. What a server of text cannot have is refused in the shape that the package makes its own error of.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any, Literal

import anthropic
import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel

from started_server import started_server

pytestmark = pytest.mark.slow

MODEL = "bundled"
TURN: Any = [{"role": "user", "content": "Hello, who are you?"}]
CHAT: Any = {"model": MODEL, "messages": TURN, "max_tokens": 60, "temperature": 0}
THEIRS: Any = {
    "model": MODEL,
    "messages": TURN,
    "max_tokens": 60,
    "extra_body": {"temperature": 0},
}  # no field of theirs
SCHEMA: Any = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL: Any = {"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA, "strict": True}}
FLAT_TOOL: Any = {"type": "function", "name": "get_weather", "parameters": SCHEMA, "strict": True}
THEIR_TOOL: Any = {"name": "get_weather", "description": "Of a city.", "input_schema": SCHEMA}


class Form(BaseModel):
    """What a structured output is read into; every answer that fits is short."""

    city: Literal["Paris", "Rome"]
    is_large: bool


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with started_server("--no-engine-spare", rows=8) as server:
        yield server.url


@pytest.fixture(scope="module")
def client(url: str) -> OpenAI:
    return OpenAI(base_url=url + "/v1", api_key="x", max_retries=0, timeout=180)


@pytest.fixture(scope="module")
def other(url: str) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=url, api_key="x", max_retries=0, timeout=180)


def test_chat_whole_and_streamed(client: OpenAI) -> None:
    whole = client.chat.completions.create(**CHAT)
    chunks = list(client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **CHAT))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    with client.chat.completions.stream(**CHAT) as stream:
        assert {event.type for event in stream} >= {"chunk", "content.delta", "content.done"}
        assert stream.get_final_completion().choices[0].message.content == whole.choices[0].message.content


def test_chat_with_every_field(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[
            {"role": "developer", "content": "Be short."},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "bob"},
        ],
        max_completion_tokens=5,
        frequency_penalty=0.1,
        presence_penalty=0.1,
        logit_bias={"5": 1},
        top_p=0.9,
        temperature=0.7,
        stop=["zzz"],
        user="u",
        metadata={"a": "b"},
        store=False,
        service_tier="auto",
        safety_identifier="s",
        prompt_cache_key="k",
        verbosity="low",
        reasoning_effort="low",
        modalities=["text"],
        prediction={"type": "content", "content": "x"},
    )
    assert answer.usage is not None and 0 < answer.usage.completion_tokens <= 5


def test_log_probabilities_choices_seeds_stops(client: OpenAI) -> None:
    found = client.chat.completions.create(logprobs=True, top_logprobs=3, **CHAT).choices[0].logprobs
    assert found is not None and found.content and all(len(entry.top_logprobs) == 3 for entry in found.content)
    many = [client.chat.completions.create(**CHAT | {"temperature": 1, "n": 3, "seed": 7}).choices for _ in range(2)]
    assert [choice.message.content for choice in many[0]] == [choice.message.content for choice in many[1]]
    assert client.chat.completions.create(stop=["e"], **CHAT).choices[0].finish_reason == "stop"


def test_chat_structured_outputs(client: OpenAI) -> None:
    parsed = client.chat.completions.parse(response_format=Form, **CHAT).choices[0].message.parsed
    with client.chat.completions.stream(response_format=Form, **CHAT) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == parsed and parsed is not None
    any_json = (
        client.chat.completions.create(response_format={"type": "json_object"}, **CHAT).choices[0].message.content
    )
    assert any_json and any_json.lstrip().startswith("{")


def test_chat_tools(client: OpenAI) -> None:
    [choice] = client.chat.completions.create(tools=[TOOL], tool_choice="required", **CHAT).choices
    assert choice.finish_reason == "tool_calls" and choice.message.tool_calls
    result = {"role": "tool", "tool_call_id": choice.message.tool_calls[0].id, "content": "sunny"}
    for said in (choice.message, choice.message.model_dump(exclude_none=True)):
        again = CHAT | {"messages": [*TURN, said, result]}
        assert client.chat.completions.create(tools=[TOOL], **again).choices[0].finish_reason
    with client.chat.completions.stream(tools=[TOOL], tool_choice="required", **CHAT) as stream:
        assert "tool_calls.function.arguments.done" in {event.type for event in stream}
        calls = stream.get_final_completion().choices[0].message.tool_calls
        assert calls and calls[0].function.parsed_arguments in ({"city": "Paris"}, {"city": "Rome"})
    parsed = client.chat.completions.parse(tools=[openai.pydantic_function_tool(Form)], tool_choice="required", **CHAT)
    calls = parsed.choices[0].message.tool_calls
    assert calls and isinstance(calls[0].function.parsed_arguments, Form)
    named = {"type": "function", "function": {"name": "get_weather"}}
    choices: Any = ("auto", "none", named)
    for choose in choices:
        assert client.chat.completions.create(
            tools=[TOOL], tool_choice=choose, parallel_tool_calls=True, **CHAT
        ).choices


def test_completions(client: OpenAI) -> None:
    wish: Any = {"model": MODEL, "prompt": ["a b", "c d"], "max_tokens": 3, "n": 2, "seed": 1}
    choices = client.completions.create(echo=True, logprobs=2, **wish).choices
    assert len(choices) == 4 and choices[0].logprobs is not None and choices[2].text.startswith("c d")
    assert {chunk.choices[0].index for chunk in client.completions.create(stream=True, **wish)} == {0, 1, 2, 3}


def test_responses(client: OpenAI) -> None:
    wish: Any = {"model": MODEL, "max_output_tokens": 16}
    first = client.responses.create(input="Hello", **wish)
    second = client.responses.create(input="And?", previous_response_id=first.id, instructions="Be short.", **wish)
    assert first.output_text and second.output_text and client.responses.retrieve(first.id).id == first.id
    assert len(client.responses.input_items.list(second.id).data) == 1
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)
    history: Any = [{"role": "user", "content": "Hello"}, *second.output, {"role": "user", "content": "x"}]
    told = client.responses.create(input=history, include=["message.output_text.logprobs"], top_logprobs=2, **wish)
    assert told.output[0].content[0].logprobs
    assert client.responses.input_tokens.count(model=MODEL, input="Hello").input_tokens > 0


def test_responses_streamed_and_in_the_background(client: OpenAI) -> None:
    wish: Any = {"model": MODEL, "max_output_tokens": 16, "input": "Hello"}
    with client.responses.stream(**wish) as stream:
        types = [event.type for event in stream]
        assert types[0] == "response.created" and stream.get_final_response().output_text
    events: Any = list(client.responses.create(background=True, stream=True, **wish))
    name = events[0].response.id
    again = list(client.responses.retrieve(name, stream=True, starting_after=0))
    assert [event.type for event in again] == [event.type for event in events[1:]]
    assert client.responses.retrieve(name).status in ("completed", "incomplete")


def test_responses_structured_and_tools(client: OpenAI) -> None:
    wish: Any = {"model": MODEL, "max_output_tokens": 60, "temperature": 0}
    assert isinstance(client.responses.parse(input="Hello", text_format=Form, **wish).output_parsed, Form)
    made = client.responses.create(input="Weather?", tools=[FLAT_TOOL], tool_choice="required", **wish)
    [call] = [item for item in made.output if item.type == "function_call"]
    result: Any = [{"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}]
    assert client.responses.create(input=result, previous_response_id=made.id, tools=[FLAT_TOOL], **wish).output
    with client.responses.stream(input="Weather?", tools=[FLAT_TOOL], tool_choice="required", **wish) as stream:
        assert "response.function_call_arguments.done" in {event.type for event in stream}


def test_models_headers_and_many_at_once(client: OpenAI, url: str) -> None:
    assert client.models.retrieve(client.models.list().data[0].id).id == MODEL
    assert client.chat.completions.with_raw_response.create(**CHAT).request_id
    with client.chat.completions.with_streaming_response.create(**CHAT) as response:
        assert response.read()

    async def many() -> int:
        async with openai.AsyncOpenAI(base_url=url + "/v1", api_key="x", timeout=180) as them:
            return len(await asyncio.gather(*(them.chat.completions.create(**CHAT) for _ in range(40))))

    assert asyncio.run(many()) == 40


@pytest.mark.parametrize(
    ("ask", "error"),
    [
        (lambda c: c.models.retrieve("nobody"), openai.NotFoundError),
        (lambda c: c.files.list(), openai.NotFoundError),
        (lambda c: c.files.create(file=("a.txt", b"x"), purpose="batch"), openai.NotFoundError),
        (lambda c: c.batches.list(), openai.NotFoundError),
        (lambda c: c.embeddings.create(model=MODEL, input="x"), openai.NotFoundError),
        (lambda c: c.images.generate(prompt="x"), openai.NotFoundError),
        (lambda c: c.moderations.create(input="x"), openai.NotFoundError),
        (lambda c: c.audio.transcriptions.create(model=MODEL, file=("a.wav", b"x")), openai.NotFoundError),
        (lambda c: c.chat.completions.create(**CHAT | {"messages": []}), openai.BadRequestError),
        (lambda c: c.chat.completions.create(**CHAT | {"messages": PICTURE}), openai.BadRequestError),
        (lambda c: c.responses.create(model=MODEL, input="x", tools=[{"type": "web_search"}]), openai.BadRequestError),
    ],
)
def test_what_is_not_there_is_refused(
    client: OpenAI, ask: Callable[[OpenAI], object], error: type[openai.APIStatusError]
) -> None:
    with pytest.raises(error) as caught:
        ask(client)
    assert caught.value.body and caught.value.message


PICTURE: Any = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/y.png"}}]}]


def test_messages_whole_and_streamed(other: anthropic.Anthropic) -> None:
    system: Any = [{"type": "text", "text": "Be short.", "cache_control": {"type": "ephemeral"}}]
    whole = other.messages.create(system=system, **THEIRS)
    with other.messages.stream(system=system, **THEIRS) as stream:
        assert "".join(stream.text_stream) == whole.content[0].text
        assert stream.get_final_message().usage.output_tokens == whole.usage.output_tokens
    stopped = other.messages.create(stop_sequences=["e"], metadata={"user_id": "x"}, service_tier="auto", **THEIRS)
    assert stopped.stop_reason == "stop_sequence"


def test_messages_tools(other: anthropic.Anthropic) -> None:
    made = other.messages.create(tools=[THEIR_TOOL], tool_choice={"type": "any"}, **THEIRS)
    [use] = [block for block in made.content if block.type == "tool_use"]
    assert made.stop_reason == "tool_use" and use.input["city"] in ("Paris", "Rome")
    result: Any = {"type": "tool_result", "tool_use_id": use.id, "content": [{"type": "text", "text": "sunny"}]}
    back: Any = [*TURN, {"role": "assistant", "content": made.content}, {"role": "user", "content": [result]}]
    assert other.messages.create(tools=[THEIR_TOOL], **THEIRS | {"messages": back}).stop_reason
    with other.messages.stream(
        tools=[THEIR_TOOL],
        tool_choice={"type": "tool", "name": "get_weather", "disable_parallel_tool_use": True},
        **THEIRS,
    ) as stream:
        assert "input_json" in {event.type for event in stream}
        assert stream.get_final_message().content[-1].type == "tool_use"


def test_messages_thoughts_structured_outputs_counts(other: anthropic.Anthropic) -> None:
    wish = THEIRS | {"max_tokens": 1100}
    assert other.messages.create(thinking={"type": "enabled", "budget_tokens": 1024}, **wish).stop_reason
    assert isinstance(other.messages.parse(output_format=Form, **THEIRS).parsed_output, Form)
    count = other.messages.count_tokens(model=MODEL, messages=TURN, tools=[THEIR_TOOL], system="x").input_tokens
    assert count > other.beta.messages.count_tokens(model=MODEL, messages=TURN).input_tokens > 0
    assert other.beta.messages.create(betas=["prompt-caching-2024-07-31"], **THEIRS).stop_reason
    assert [model.id for model in other.models.list()] == [MODEL] and other.models.retrieve(MODEL).id == MODEL


@pytest.mark.parametrize(
    ("ask", "error"),
    [
        (lambda c: c.messages.create(**THEIRS | {"model": "nobody"}), anthropic.NotFoundError),
        (lambda c: list(c.messages.batches.list()), anthropic.NotFoundError),
        (lambda c: c.messages.create(**THEIRS | {"messages": []}), anthropic.BadRequestError),
        (
            lambda c: c.messages.create(tools=[{"type": "web_search_20250305", "name": "x"}], **THEIRS),
            anthropic.BadRequestError,
        ),
    ],
)
def test_what_is_not_there_is_refused_in_their_shape(
    other: anthropic.Anthropic, ask: Callable[[anthropic.Anthropic], object], error: type[anthropic.APIStatusError]
) -> None:
    with pytest.raises(error) as caught:
        ask(other)
    assert caught.value.body["type"] == "error"  # type: ignore[index]
