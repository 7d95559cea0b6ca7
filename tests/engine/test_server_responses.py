"""/v1/responses as the openai library uses it: answers, events, the store, conversations that go on, background."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from served import Running, Setup, refused, served

from quire.config import ServeOptions
from quire.errors import NotFoundError
from quire.serve.store import Store, Stored
from waiting import until


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    options = ServeOptions(enable_prompt_tokens_details=True)
    with served(Setup(options=options, keys=("first", "second"), delay=0.005)) as running:
        yield running


def create(server: Running, **fields: Any) -> Any:
    return server.client.responses.create(**({"model": "parrot", "input": "say:hello;"} | fields))


def test_an_answer(server: Running) -> None:
    response = create(server, instructions="be kind", metadata={"a": "b"}, temperature=0.5)
    assert response.output_text == "hello" and response.status == "completed"
    assert response.id.startswith("resp_") and response.model == "parrot" and response.object == "response"
    message = response.output[0]
    assert (message.type, message.role, message.status) == ("message", "assistant", "completed")
    usage = response.usage
    assert usage.output_tokens == 6 and usage.total_tokens == usage.input_tokens + 6
    assert response.instructions == "be kind" and response.metadata == {"a": "b"} and response.temperature == 0.5
    assert response.error is None and response.incomplete_details is None


def test_too_little_room_is_an_incomplete_answer(server: Running) -> None:
    response = create(server, input="no end", max_output_tokens=4)
    assert response.status == "incomplete" and response.incomplete_details.reason == "max_output_tokens"
    assert response.output_text == "abcd" and response.output[0].status == "incomplete"


def test_fields_of_the_other_routes(server: Running) -> None:
    body = {"stop": "l", "repetition_penalty": 1.1, "logit_bias": {"5": 1}, "structured_outputs": {"regex": "[a-z]+"}}
    response = create(server, input="say:hello;", extra_body=body)
    assert response.output_text == "he" and response.status == "completed"
    params = [new for plan in server.executor.plans for new in plan.admitted][-1].params
    assert (params.repetition_penalty, params.logit_bias) == (
        1.1,
        ((5, 1.0),),
    ) and params.structured_outputs is not None


def test_items_as_input(server: Running) -> None:
    talk = [
        {"role": "developer", "content": "system text"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "x"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "say:no;"}]},
        {"role": "user", "content": [{"type": "input_text", "text": "say:yes;"}]},
    ]
    assert create(server, input=talk).output_text == "yes"


def test_events(server: Running) -> None:
    events = list(create(server, stream=True))
    kinds = [event.type.removeprefix("response.") for event in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "completed"]
    assert set(kinds[4:-4]) == {"output_text.delta"}
    assert "".join(event.delta for event in events[4:-4]) == "hello" == events[-4].text
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[-1].response.output_text == "hello" and events[-1].response.usage.output_tokens == 6
    assert {event.item_id for event in events[3:-2]} == {events[-1].response.output[0].id}


def test_the_libraries_own_reader_of_streams(server: Running) -> None:
    with server.client.responses.stream(model="parrot", input="say:hello;") as stream:
        assert stream.get_final_response().output_text == "hello"


def test_events_on_the_wire(server: Running) -> None:
    body = {"input": "x", "max_output_tokens": 2, "stream": True}
    lines = server.http.post("/v1/responses", json=body).text.split("\n\n")
    assert lines[-1] == "" and not any("[DONE]" in line for line in lines)
    for line in lines[:-1]:
        name, data = line.split("\n")
        assert name == "event: " + json.loads(data.removeprefix("data: "))["type"]
    assert "event: response.incomplete" in lines[-2]


def test_log_probabilities(server: Running) -> None:
    include = ["message.output_text.logprobs"]
    whole = create(server, include=include, top_logprobs=2).output[0].content[0].logprobs
    assert "".join(entry.token for entry in whole[:5]) == "hello"
    assert whole[0].top_logprobs[0].token == "h"
    events = list(create(server, include=include, top_logprobs=2, stream=True))
    done = next(event for event in events if event.type == "response.output_text.done")
    assert [entry.token for entry in done.logprobs] == [entry.token for entry in whole]


def test_a_conversation_goes_on(server: Running) -> None:
    first = create(server, input="say:one;", instructions="only here")
    second = create(server, input="and then?", previous_response_id=first.id)
    assert second.output_text == "one", "the earlier messages are before the model"
    assert second.previous_response_id == first.id and second.instructions is None
    stored = server.service.store.get(second.id, next(iter(server.service.store._found.values())).tenant)
    assert [message["content"] for message in stored.messages] == ["say:one;", "one", "and then?", "one"]
    assert server.client.responses.retrieve(second.id).output_text == "one"
    server.client.responses.delete(second.id)
    with pytest.raises(openai.NotFoundError):
        server.client.responses.retrieve(second.id)


def test_what_is_not_stored_is_not_found(server: Running) -> None:
    response = create(server, store=False)
    with pytest.raises(openai.NotFoundError):
        server.client.responses.retrieve(response.id)
    with pytest.raises(openai.NotFoundError):
        create(server, previous_response_id=response.id)


def test_another_tenant_finds_nothing(server: Running) -> None:
    response = create(server)
    other = {"Authorization": "Bearer second"}
    for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/cancel")):
        refused(server.http.request(method, f"/v1/responses/{response.id}{path}", headers=other), 404)
    refused(
        server.http.post("/v1/responses", json={"input": "x", "previous_response_id": response.id}, headers=other), 404
    )
    assert server.client.responses.retrieve(response.id).output_text == "hello"


def test_in_the_background(server: Running) -> None:
    response = create(server, background=True)
    assert response.status in ("queued", "in_progress") and response.background is True
    until(lambda: server.client.responses.retrieve(response.id).status == "completed")
    assert server.client.responses.retrieve(response.id).output_text == "hello"
    assert server.client.responses.cancel(response.id).status == "completed"


def test_followed_in_the_background(server: Running) -> None:
    """Events go on without their reader, and are told again from any of them on."""
    with create(server, input="no end", max_output_tokens=20, background=True, stream=True) as events:
        first = next(iter(events))  # whoever reads leaves after it
    assert first.type == "response.created" and first.response.status == "queued"
    key = first.response.id
    told = list(server.client.responses.retrieve(key, stream=True))
    kinds = [event.type.removeprefix("response.") for event in told]
    assert kinds[:2] == ["created", "in_progress"] and kinds[-1] == "incomplete"
    assert [event.sequence_number for event in told] == list(range(len(told)))
    assert told[-1].response.output_text == "abcdefghij" * 2
    assert server.client.responses.retrieve(key).output_text == "abcdefghij" * 2
    later = list(server.client.responses.retrieve(key, stream=True, starting_after=7))
    assert [event.to_dict() for event in later] == [event.to_dict() for event in told[8:]]
    refused(server.http.get(f"/v1/responses/{key}?stream=true&starting_after=1000"))
    refused(server.http.get(f"/v1/responses/{create(server, background=True).id}?stream=true"))
    refused(server.http.get("/v1/responses/resp_none?stream=true"), 404)
    failed = list(create(server, input="crash;", background=True, stream=True))
    assert [event.type.removeprefix("response.") for event in failed] == ["created", "failed"]
    failed = list(create(server, input="crash after 3;", background=True, stream=True))
    kinds = [event.type for event in failed if event.type.endswith((".created", ".failed", ".completed"))]
    assert kinds == ["response.created", "response.failed"]
    assert server.client.responses.retrieve(failed[0].response.id).status == "failed"
    with create(server, input="no end", background=True, stream=True) as events:
        key = next(iter(events)).response.id
        assert server.client.responses.cancel(key).status == "cancelled"
        assert all(event.type not in ("response.completed", "response.failed") for event in events)


def test_what_was_sent_can_be_read_again(server: Running) -> None:
    first = create(server, input="say:one;")
    [item] = server.client.responses.input_items.list(first.id)
    assert (item.type, item.role, item.content[0].text) == ("message", "user", "say:one;") and item.id
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
    talk = [
        {"role": "user", "content": [{"type": "input_text", "text": "call it"}]},
        {"role": "assistant", "content": "so be it"},
        call,
        {"type": "function_call_output", "call_id": "c", "output": "done"},
        {"role": "user", "content": "say:two;"},
    ]
    second = create(server, input=talk, previous_response_id=first.id)
    found = list(server.client.responses.input_items.list(second.id, order="asc", limit=2))  # page by page
    kinds = ["message", "message", "function_call", "function_call_output", "message"]
    assert [item.type for item in found] == kinds and found[1].content[0].type == "output_text"
    assert list(server.client.responses.input_items.list(second.id)) == found[::-1]
    page = server.http.get(f"/v1/responses/{second.id}/input_items?limit=2&after={found[1].id}").json()
    assert [item["id"] for item in page["data"]] == [found[0].id] and not page["has_more"]
    for query in ("limit=0", "limit=x", "order=up", "after=nobody"):
        refused(server.http.get(f"/v1/responses/{second.id}/input_items?{query}"))
    other = {"Authorization": "Bearer second"}
    refused(server.http.get(f"/v1/responses/{second.id}/input_items", headers=other), 404)


def test_tokens_of_an_input(server: Running) -> None:
    first = create(server, input="say:one;")
    for fields in ({"input": "hello"}, {"input": "and?", "previous_response_id": first.id, "instructions": "be kind"}):
        counted = server.client.responses.input_tokens.count(model="parrot", **fields)
        assert counted.object == "response.input_tokens"
        assert counted.input_tokens == create(server, **fields).usage.input_tokens
    refused(server.http.post("/v1/responses/input_tokens", json={"input": []}))


def test_a_cancelled_one(server: Running) -> None:
    for wait in (False, True):
        response = create(server, input="no end", background=True)
        if wait:
            until(lambda key=response.id: server.client.responses.retrieve(key).status == "in_progress")
        assert server.client.responses.cancel(response.id).status == "cancelled"
        assert server.client.responses.retrieve(response.id).status == "cancelled"
    server.wait_idle()
    refused(server.http.post(f"/v1/responses/{create(server).id}/cancel"))


def test_what_fails_in_the_background_says_so(server: Running) -> None:
    response = create(server, input="crash;", background=True)
    until(lambda: server.client.responses.retrieve(response.id).status == "failed")
    error = server.client.responses.retrieve(response.id).error
    assert error.code == "server_error" and "secret" not in error.message
    refused(server.http.post("/v1/responses", json={"input": "x", "previous_response_id": response.id}))


def test_what_fails_in_a_stream_says_so(server: Running) -> None:
    events = list(create(server, input="crash after 3;", stream=True))
    assert events[-1].type == "response.failed" and events[-1].response.status == "failed"
    with pytest.raises(openai.InternalServerError):
        create(server, input="crash;", stream=True)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": ""}, None),
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": [7]}, "input[0]"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": 5}]}, "input[0].content"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].call_id"),
        ({"input": [{"type": "function_call", "call_id": "x"}]}, "input[0]"),
        ({"input": [{"type": "computer_call"}]}, "input[0].type"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "file_search"}}, "tool_choice.type"),
        ({"text": {"format": {"type": "xml"}}}, "response_format"),
        ({"truncation": "auto"}, "truncation"),
        ({"prompt": {"id": "x"}}, "prompt"),
        ({"conversation": "x"}, "conversation"),
        ({"include": ["file_search_call.results"]}, "include"),
        ({"background": True, "store": False}, "background"),
        ({"text": {"format": ""}}, "text.format"),
        ({"previous_response_id": "resp_none"}, "response_id"),
        ({"temperature": 5}, "temperature"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"stop": [""]}, "stop"),
        ({"vllm_xargs": {"a": {}}}, None),
        ({"max_output_tokens": 0}, "max_tokens"),
        ({"chat_template": "{{ messages }}"}, "chat_template"),  # CVE-2026-115918: this very route forgot to ask
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
    ],
)
def test_what_is_refused(server: Running, fields: dict[str, Any], param: str | None) -> None:
    response = server.http.post("/v1/responses", json={"input": "say:hello;"} | fields)
    if param is None:
        assert response.status_code in (200, 400)
    else:
        assert refused(response, 404 if fields.get("previous_response_id") else 400)["param"] == param


def test_the_store_is_bounded() -> None:
    store = Store(3)
    for number in range(5):
        store.put(Stored("t", {"id": f"r{number}"}, [{"role": "user", "content": "x"}]))
    assert list(store._found) == ["r2", "r3", "r4"] and store._chars == 3
    store.put(Stored("t", {"id": "r2"}, []))
    store.put(Stored("t", {"id": "r5"}, []))
    assert list(store._found) == ["r4", "r2", "r5"] and store._chars == 1
    with pytest.raises(NotFoundError):
        store.get("r2", "u")
    store.remove("r2", "t")
    assert len(store) == 2


def test_a_server_that_keeps_nothing() -> None:
    with served(Setup(options=ServeOptions(max_stored_responses=0))) as server:
        response = create(server)
        assert response.output_text == "hello"
        refused(server.http.get(f"/v1/responses/{response.id}"), 404)
        refused(server.http.post("/v1/responses", json={"input": "x", "background": True}))


def test_the_client_that_leaves_ends_it(server: Running) -> None:
    body = {"input": "no end", "stream": True}
    with httpx.stream(
        "POST", server.url + "/v1/responses", json=body, headers=server.http.headers, timeout=60
    ) as response:
        next(response.iter_lines())
    server.wait_idle()


# -------------------------------------------------------------------- tools, thoughts and forms

CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL: dict[str, Any] = {"type": "function", "name": "get_weather", "parameters": CITY}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
SAID = f"say:<think>hmm</think>Let me see.{CALL};"


@pytest.fixture(scope="module")
def speaker() -> Iterator[Running]:
    """A server whose model writes calls and thoughts in a known way."""
    with served(Setup(ServeOptions(tool_call_parser="hermes", reasoning_parser="qwen3"))) as running:
        yield running


def test_thoughts_text_and_calls_are_items(speaker: Running) -> None:
    response = create(speaker, input=SAID, tools=[TOOL])
    assert [item.type for item in response.output] == ["reasoning", "message", "function_call"]
    thoughts, message, call = response.output
    assert thoughts.content[0].text == "hmm" and message.content[0].text == "Let me see." == response.output_text
    assert (
        call.name == "get_weather"
        and json.loads(call.arguments) == {"city": "Oslo"}
        and call.call_id.startswith("call_")
    )
    assert response.status == "completed" and response.tools[0].name == "get_weather"


def test_events_of_thoughts_text_and_calls(speaker: Running) -> None:
    events = list(create(speaker, input=SAID, tools=[TOOL], stream=True))
    kinds = [event.type.removeprefix("response.") for event in events]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    added = [event.item.type for event in events if event.type.endswith("output_item.added")]
    done = [event.item.type for event in events if event.type.endswith("output_item.done")]
    assert added == done == ["reasoning", "message", "function_call"]
    thoughts = "".join(event.delta for event in events if event.type == "response.reasoning_text.delta")
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    arguments = "".join(event.delta for event in events if event.type == "response.function_call_arguments.delta")
    assert (thoughts, text, json.loads(arguments)) == ("hmm", "Let me see.", {"city": "Oslo"})
    assert kinds[-3:] == ["function_call_arguments.done", "output_item.done", "completed"]
    final = events[-1].response
    assert [item.id for item in final.output] == [
        event.item.id for event in events if event.type.endswith("output_item.added")
    ]
    with speaker.client.responses.stream(model="parrot", input=SAID, tools=[TOOL]) as stream:
        found = stream.get_final_response()
    assert [item.type for item in found.output] == ["reasoning", "message", "function_call"]


EVENTS = re.compile(
    r"created in_progress "
    r"(output_item\.added "
    r"((content_part\.added (output_text\.delta )*output_text\.done content_part\.done )"
    r"|(content_part\.added (reasoning_text\.delta )*reasoning_text\.done content_part\.done )"
    r"|((function_call_arguments\.delta )*function_call_arguments\.done ))"
    r"output_item\.done )+"
    r"(completed|incomplete) "
)


@pytest.mark.parametrize(
    "said",
    [
        "plain",
        SAID[4:-1],
        f"First.{CALL}Between.{CALL}Last.",
        f"<think>a</think>{CALL}",
        "<think>cut",
        f"{CALL[:60]}",
        "",
    ],
)
def test_items_and_events_stand_in_the_order_of_the_answer(speaker: Running, said: str) -> None:
    whole = create(speaker, input=f"say:{said};", tools=[TOOL])
    events = list(create(speaker, input=f"say:{said};", tools=[TOOL], stream=True))
    kinds = "".join(event.type.removeprefix("response.") + " " for event in events)
    assert EVENTS.fullmatch(kinds), kinds

    def shown(item: Any) -> dict[str, Any]:
        return item.model_dump(exclude={"id", "call_id"})

    assert [shown(item) for item in events[-1].response.output] == [shown(item) for item in whole.output]
    if said.startswith("First"):
        texts = [item.content[0].text for item in whole.output if item.type == "message"]
        assert texts == ["First.", "Between.", "Last."]


def test_results_of_tools_go_back(speaker: Running) -> None:
    first = create(speaker, input=SAID, tools=[TOOL])
    result = {"type": "function_call_output", "call_id": first.output[2].call_id, "output": "rain"}
    talk = [result, {"role": "user", "content": "say:wet;"}]
    second = create(speaker, input=talk, previous_response_id=first.id, tools=[TOOL])
    assert second.output_text == "wet"
    stored = speaker.service.store.get(second.id, "")
    assert [message["role"] for message in stored.messages] == ["user", "assistant", "tool", "user", "assistant"]
    assert stored.messages[1]["tool_calls"][0]["id"] == stored.messages[2]["tool_call_id"]
    items = [item.model_dump(exclude_none=True) for item in first.output]
    again = create(speaker, input=[{"role": "user", "content": SAID}, *items, *talk], tools=[TOOL], store=False)
    assert again.output_text == "wet" and again.usage.input_tokens == second.usage.input_tokens


def test_a_tool_that_must_be_called(speaker: Running) -> None:
    for choice in ("required", {"type": "function", "name": "get_weather"}):
        response = create(speaker, input=f"say:{CALL};", tools=[TOOL], tool_choice=choice)
        assert response.output[-1].type == "function_call"
        assert set(json.loads(response.output[-1].arguments)) == {"city"}


def test_an_answer_in_a_form(speaker: Running) -> None:
    form = {"format": {"type": "json_schema", "name": "city", "schema": CITY, "strict": True}}
    said = 'say:{"city": "Oslo"};'
    response = create(speaker, input=said, text=form)
    assert set(json.loads(response.output_text)) == {"city"} and response.text.format.type == "json_schema"
    response = create(
        speaker, input="x", text={"format": {"type": "json_object"}}, temperature=0, max_output_tokens=300
    )
    assert response.text.format.type == "json_object"
