"""/v1/messages as the anthropic library uses it: answers, events, counting, and its shape of errors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest
from served import TOKENIZER, Running, Setup, served

from quire.config import ServeOptions

HELLO: list[dict[str, Any]] = [{"role": "user", "content": "say:hello;"}]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with served(Setup(keys=("secret",))) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="secret", max_retries=0, timeout=60) as found:
        yield found


def create(client: anthropic.Anthropic, **fields: Any) -> Any:
    return client.messages.create(**({"model": "parrot", "max_tokens": 50, "messages": HELLO} | fields))


def test_an_answer(client: anthropic.Anthropic) -> None:
    message = create(client, system="be kind", metadata={"user_id": "x"})
    assert message.content[0].type == "text" and message.content[0].text == "hello"
    assert (message.type, message.role, message.model) == ("message", "assistant", "parrot")
    assert message.stop_reason == "end_turn" and message.stop_sequence is None and message.id.startswith("msg-")
    assert message.usage.output_tokens == 6 and message.usage.cache_read_input_tokens == 0
    prompt = "<|turn|>system:be kind<|end|><|turn|>user:say:hello;<|end|><|turn|>assistant|"
    assert message.usage.input_tokens == len(TOKENIZER.encode(prompt, add_special_tokens=False))


def test_why_it_stopped(client: anthropic.Anthropic) -> None:
    endless = [{"role": "user", "content": "no end"}]
    assert create(client, messages=endless, max_tokens=3).stop_reason == "max_tokens"
    stopped = create(client, messages=endless, stop_sequences=["de", "x"], max_tokens=20)
    assert (stopped.stop_reason, stopped.stop_sequence, stopped.content[0].text) == ("stop_sequence", "de", "abc")


def test_blocks_and_an_answer_that_is_begun(client: anthropic.Anthropic) -> None:
    blocks = [{"type": "text", "text": "say:hello;"}, {"type": "text", "text": "more"}]
    system = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert create(client, messages=[{"role": "user", "content": blocks}], system=system).content[0].text == "hello"
    begun = [*HELLO, {"role": "assistant", "content": "I say"}]
    counted = client.messages.count_tokens(model="parrot", messages=begun).input_tokens
    expected = "<|turn|>user:say:hello;<|end|><|turn|>assistant:I say"
    assert counted == len(TOKENIZER.encode(expected, add_special_tokens=False))
    assert create(client, messages=begun, max_tokens=1).usage.input_tokens == counted


def test_events(client: anthropic.Anthropic) -> None:
    events = list(create(client, stream=True))
    kinds = [event.type for event in events]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert events[0].message.usage.input_tokens > 0 and events[0].message.content == []
    assert events[-2].delta.stop_reason == "end_turn" and events[-2].usage.output_tokens == 6
    with client.messages.stream(model="parrot", max_tokens=50, messages=HELLO) as stream:
        assert "".join(stream.text_stream) == "hello"
        final = stream.get_final_message()
    assert final.content[0].text == "hello" and final.stop_reason == "end_turn" and final.usage.output_tokens == 6


def test_events_on_the_wire(server: Running) -> None:
    body = {"max_tokens": 3, "messages": HELLO, "stream": True}
    parts = server.http.post("/v1/messages", json=body).text.split("\n\n")
    assert parts[-1] == "" and "[DONE]" not in "".join(parts)
    for part in parts[:-1]:
        name, data = part.split("\n")
        assert name == "event: " + json.loads(data.removeprefix("data: "))["type"]


def test_counting(client: anthropic.Anthropic) -> None:
    counted = client.messages.count_tokens(model="parrot", messages=HELLO, system="x").input_tokens
    assert counted == create(client, system="x").usage.input_tokens


def test_cached_tokens_where_they_are_shown() -> None:
    with served(Setup(options=ServeOptions(enable_prompt_tokens_details=True))) as server:
        found = [
            server.http.post("/v1/messages", json={"max_tokens": 1, "messages": HELLO}).json()["usage"] for _ in "ab"
        ]
        assert found[0]["cache_read_input_tokens"] == 0 < found[1]["cache_read_input_tokens"]
        assert found[1]["input_tokens"] + found[1]["cache_read_input_tokens"] == found[0]["input_tokens"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "message"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "messages[0].content[0].tool_use_id"),
        ({"system": [{"type": "image"}]}, "system[0].type"),
        ({"tools": [{"name": "x", "input_schema": {}}]}, "--tool-call-parser"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools[0].type"),
        ({"tools": [{"name": "x"}], "tool_choice": {"type": "tool", "name": "y"}}, "tool_choice"),
        ({"output_config": {"format": {"type": "xml"}}}, "output_config.format"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"thinking": {"type": "enabled", "budget_tokens": 2000}}, "thinking"),
        ({"mcp_servers": [{}]}, "mcp_servers"),
        ({"temperature": 2}, "temperature"),
        ({"top_p": 7}, "top_p"),
        ({"stop_sequences": ["x"] * 100}, "stop"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
    ],
)
def test_what_is_refused(server: Running, fields: dict[str, Any], words: str) -> None:
    body = {"max_tokens": 5, "messages": HELLO} | fields
    response = server.http.post("/v1/messages", json=body)
    assert response.status_code == 400
    found = response.json()
    assert found["type"] == "error" and found["error"]["type"] == "invalid_request_error"
    assert words in found["error"]["message"]


def test_errors_as_the_library_knows_them(server: Running, client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError, match="does not exist"):
        create(client, model="nobody")
    with pytest.raises(anthropic.AuthenticationError) as caught:
        create(client.with_options(api_key="wrong"))
    assert caught.value.body["error"]["type"] == "authentication_error"  # type: ignore[index]
    with pytest.raises(anthropic.InternalServerError) as failed:
        create(client, messages=[{"role": "user", "content": "crash;"}])
    assert failed.value.body["error"]["type"] == "api_error"  # type: ignore[index]
    assert "secret/path" not in str(failed.value)
    with pytest.raises(anthropic.APIError):
        list(create(client, messages=[{"role": "user", "content": "crash after 3;"}], stream=True))


# -------------------------------------------------------------------- tools, thoughts and forms

TOOL: dict[str, Any] = {
    "name": "get_weather",
    "description": "the weather somewhere",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


@pytest.fixture(scope="module")
def speaker() -> Iterator[anthropic.Anthropic]:
    """A client of a server whose model writes calls and thoughts in a known way."""
    with served(Setup(ServeOptions(tool_call_parser="hermes", reasoning_parser="qwen3"))) as running:
        yield anthropic.Anthropic(base_url=running.url, api_key="none", max_retries=0, timeout=60)


def says(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": f"say:{text};"}]


def test_thoughts_text_and_calls_are_blocks(speaker: anthropic.Anthropic) -> None:
    messages = says(f"<think>hmm</think>Let me see.{CALL}{CALL}")
    message = create(speaker, messages=messages, tools=[TOOL], max_tokens=300)
    assert [block.type for block in message.content] == ["thinking", "text", "tool_use", "tool_use"]
    thinking, text, call, other = message.content
    assert thinking.thinking == "hmm" and text.text == "Let me see." and message.stop_reason == "tool_use"
    assert call.name == "get_weather" and call.input == {"city": "Oslo"} and call.id.startswith("toolu_")
    assert call.id != other.id
    with speaker.messages.stream(model="parrot", messages=messages, tools=[TOOL], max_tokens=300) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    assert [block.model_dump(exclude={"id"}) for block in final.content] == [
        block.model_dump(exclude={"id"}) for block in message.content
    ]
    assert final.stop_reason == "tool_use"
    raw = create(speaker, messages=messages, tools=[TOOL], max_tokens=300, stream=True)
    told = [getattr(event, "delta", event).type for event in raw if getattr(event, "index", None) == 0]
    assert told == [
        "content_block_start",
        *["thinking_delta"] * (len(told) - 3),
        "signature_delta",
        "content_block_stop",
    ]
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 4


def test_blocks_stand_in_the_order_of_the_answer(speaker: anthropic.Anthropic) -> None:
    messages = says(f"First.{CALL}Between.{CALL}Last.")
    message = create(speaker, messages=messages, tools=[TOOL], max_tokens=300)
    assert [block.type for block in message.content] == ["text", "tool_use", "text", "tool_use", "text"]
    assert [block.text for block in message.content if block.type == "text"] == ["First.", "Between.", "Last."]
    with speaker.messages.stream(model="parrot", messages=messages, tools=[TOOL], max_tokens=300) as stream:
        final = stream.get_final_message()
    without = {"exclude": {"id"}}
    assert [b.model_dump(**without) for b in final.content] == [b.model_dump(**without) for b in message.content]


def test_a_tool_that_must_be_called(speaker: anthropic.Anthropic) -> None:
    for choice in ({"type": "any"}, {"type": "tool", "name": "get_weather"}):
        message = create(speaker, messages=says(CALL), tools=[TOOL], tool_choice=choice, max_tokens=300)
        assert message.content[-1].type == "tool_use" and set(message.content[-1].input) == {"city"}
    none = create(speaker, messages=says("no call"), tools=[TOOL], tool_choice={"type": "none"})
    assert none.content[0].text == "no call" and none.stop_reason == "end_turn"


def test_results_of_tools_go_back(server: Running, speaker: anthropic.Anthropic) -> None:
    use = {"type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": {"city": "Oslo"}}
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "rain"}]}
    turns = [
        *HELLO,
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm", "signature": ""}, use]},
        {"role": "user", "content": [result, {"type": "text", "text": "say:wet;"}]},
    ]
    assert create(speaker, messages=turns, tools=[TOOL]).content[0].text == "wet"
    counted = speaker.messages.count_tokens(model="parrot", messages=turns, tools=[TOOL]).input_tokens
    expected = (
        "<|turn|>user:say:hello;<|end|><|turn|>assistant:<|end|><|turn|>tool:rain<|end|><|turn|>user:say:wet;<|end|>"
        "[1 tools]<|turn|>assistant|"
    )
    assert counted == len(TOKENIZER.encode(expected, add_special_tokens=False))


def test_an_answer_in_a_form(speaker: anthropic.Anthropic) -> None:
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer"}},
        "required": ["n"],
        "additionalProperties": False,
    }
    form = {"format": {"type": "json_schema", "schema": schema}}
    message = create(speaker, messages=says('{"n": 7}'), max_tokens=200, extra_body={"output_config": form})
    assert json.loads(message.content[-1].text) == {"n": 7}
