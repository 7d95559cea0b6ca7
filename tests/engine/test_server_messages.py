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
    with anthropic.Anthropic(base_url=server.url, api_key="secret", max_retries=0, timeout=30) as found:
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
        ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "messages[0].content[0].type"),
        ({"system": [{"type": "image"}]}, "system[0].type"),
        ({"tools": [{"name": "x", "input_schema": {}}]}, "tools"),
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
