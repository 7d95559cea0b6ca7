"""Tool calls and thoughts over HTTP: their shape in whole answers and in streams, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai.lib.streaming.chat import ChatCompletionStreamState
from served import Running, Setup, refused, served

from quire.config import ServeOptions
from quire.core.params import SamplingParams
from quire.errors import ConfigError
from quire.text.answer_format import AnswerFormat, answer_format_of, check_formats
from quire.text.reasoning_formats import reasoning_format
from quire.text.tool_choice import ToolWish, tool_wish
from quire.text.tool_formats import tool_format

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": CITY}}
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
OTHER = '<tool_call>{"name": "add", "arguments": {}}</tool_call>'


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with served(Setup(ServeOptions(tool_call_parser="hermes", reasoning_parser="qwen3"))) as running:
        yield running


def body(says: str, **fields: Any) -> dict[str, Any]:
    return {"model": "parrot", "messages": [{"role": "user", "content": f"say:{says};"}]} | fields


def streamed(server: Running, request: dict[str, Any]) -> tuple[str, str, list[dict[str, Any]], str | None, int]:
    """Content, thoughts, calls, the reason of the end and the number of chunks, as a client puts them together."""
    content = reasoning = ""
    calls: list[dict[str, Any]] = []
    reason, count = None, 0
    for chunk in server.client.chat.completions.create(stream=True, **request):
        count += 1
        choice = chunk.choices[0]
        content += choice.delta.content or ""
        reasoning += getattr(choice.delta, "reasoning", None) or ""
        for call in choice.delta.tool_calls or []:
            if call.index == len(calls):
                assert call.id and call.type == "function"
                calls.append({"id": call.id, "name": call.function.name, "arguments": ""})
            calls[call.index]["arguments"] += call.function.arguments
        reason = choice.finish_reason or reason
    return content, reasoning, calls, reason, count


def test_calls_of_a_whole_answer(server: Running) -> None:
    request = body(f"Let me see.\n{CALL}\n{OTHER}", tools=[WEATHER, ADD], max_tokens=200)
    choice = server.client.chat.completions.create(**request).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me see.\n"
    calls = choice.message.tool_calls
    assert [(call.function.name, json.loads(call.function.arguments)) for call in calls] == [
        ("get_weather", {"city": "Oslo"}),
        ("add", {}),
    ]
    assert all(call.id.startswith("chatcmpl-tool-") for call in calls) and calls[0].id != calls[1].id


def test_a_stream_says_the_same(server: Running) -> None:
    request = body(f"<think>hm</think>Let me see.\n{CALL}\n{OTHER}", tools=[WEATHER, ADD], max_tokens=200)
    content, reasoning, calls, reason, count = streamed(server, request)
    assert (content, reasoning, reason) == ("Let me see.\n", "hm", "tool_calls")
    assert [(call["name"], json.loads(call["arguments"])) for call in calls] == [
        ("get_weather", {"city": "Oslo"}),
        ("add", {}),
    ]
    assert 25 < count < 60  # text comes piece by piece, and so do the arguments of calls


def test_each_call_is_reported_when_it_is_complete(server: Running) -> None:
    """By the client's own helper, which looks for the end in a chunk behind the call."""
    request = body(f"{CALL}\n{OTHER}", tools=[WEATHER, ADD], max_tokens=200, stream=True)
    for interval in (1, 500):
        state: ChatCompletionStreamState[None] = ChatCompletionStreamState()
        chunks = server.client.chat.completions.create(extra_body={"stream_interval": interval}, **request)
        events = [event for chunk in chunks for event in state.handle_chunk(chunk)]
        done = [event.name for event in events if event.type == "tool_calls.function.arguments.done"]
        assert done == ["get_weather", "add"]
        assert state.get_final_completion().choices[0].finish_reason == "tool_calls"


def test_texts_within_elements_come_as_they_are_written() -> None:
    call = (
        '<tool_call>\n<function=get_weather>\n<parameter=city>\nA "long" text of many words\n</parameter>\n</function>'
    )
    with served(Setup(ServeOptions(tool_call_parser="qwen3_coder"))) as running:
        request = body(f"{call}\n</tool_call>", tools=[WEATHER, ADD], max_tokens=200)
        content, _, calls, reason, count = streamed(running, request)
        whole = running.client.chat.completions.create(**request).choices[0]
    assert (content, reason, count > 25) == ("", "tool_calls", True)
    assert [json.loads(found["arguments"]) for found in calls] == [{"city": 'A "long" text of many words'}]
    assert [found.function.arguments for found in whole.message.tool_calls] == [found["arguments"] for found in calls]


def test_only_a_call_has_no_content(server: Running) -> None:
    message = server.http.post("/v1/chat/completions", json=body(CALL, tools=[WEATHER], max_tokens=200)).json()
    message = message["choices"][0]["message"]
    assert message["content"] is None and len(message["tool_calls"]) == 1
    assert "index" not in message["tool_calls"][0]


def test_text_stays_text(server: Running) -> None:
    for fields in ({}, {"tools": [WEATHER], "tool_choice": "none"}):
        choice = server.client.chat.completions.create(**body(CALL, max_tokens=200, **fields)).choices[0]
        assert (choice.message.content, choice.message.tool_calls) == (CALL, None)
        assert choice.finish_reason == "stop"
    broken = CALL.replace("name", "nam")
    choice = server.client.chat.completions.create(**body(broken, tools=[WEATHER], max_tokens=200)).choices[0]
    assert choice.message.content == broken and choice.finish_reason == "stop"
    assert streamed(server, body(broken, tools=[WEATHER], max_tokens=200))[0] == broken


def test_a_call_that_is_cut_off_is_content(server: Running) -> None:
    request = body(CALL, tools=[WEATHER], max_tokens=40)
    choice = server.client.chat.completions.create(**request).choices[0]
    assert (choice.message.content, choice.finish_reason) == (CALL[:40], "length")
    assert streamed(server, request)[:4] == (CALL[:40], "", [], "length")


def test_arguments_that_are_cut_off_are_a_beginning(server: Running) -> None:
    request = body(CALL, tools=[WEATHER], max_tokens=CALL.index("Oslo") + 1)
    choice = server.client.chat.completions.create(**request).choices[0]
    [call] = choice.message.tool_calls
    assert (choice.message.content, choice.finish_reason) == (None, "length")
    assert (call.function.name, call.function.arguments) == ("get_weather", '{"city": "O')
    content, _, calls, reason, _ = streamed(server, request)
    assert (content, reason) == ("", "length")
    assert [(call["name"], call["arguments"]) for call in calls] == [("get_weather", '{"city": "O')]


def test_one_call_at_a_time(server: Running) -> None:
    request = body(CALL + OTHER, tools=[WEATHER, ADD], parallel_tool_calls=False, max_tokens=200)
    calls = server.client.chat.completions.create(**request).choices[0].message.tool_calls
    assert [call.function.name for call in calls] == ["get_weather"]
    assert [call["name"] for call in streamed(server, request)[2]] == ["get_weather"]


def test_each_choice_has_its_own_calls(server: Running) -> None:
    request = body(CALL, tools=[WEATHER], max_tokens=200, n=3, temperature=1.0)
    choices = server.client.chat.completions.create(**request).choices
    assert [len(choice.message.tool_calls) for choice in choices] == [1, 1, 1]
    assert len({choice.message.tool_calls[0].id for choice in choices}) == 3


def test_a_named_tool_ends_with_stop(server: Running) -> None:
    request = body(CALL, tools=[WEATHER, ADD], tool_choice=named("get_weather"), max_tokens=200)
    answer = server.client.chat.completions.create(**request).choices[0]
    assert answer.finish_reason == "stop" and len(answer.message.tool_calls) == 1
    form = [new for plan in server.executor.plans for new in plan.admitted][-1].params.structured_outputs
    assert "get_weather" in form.structural_tag and '"add' not in form.structural_tag
    answer = server.client.chat.completions.create(**request | {"tool_choice": "required"}).choices[0]
    assert answer.finish_reason == "tool_calls"


def test_some_tools_are_allowed(server: Running) -> None:
    """The prompt shows all; the form, and what is forced, knows the allowed ones only."""
    for mode, reason in (("required", "tool_calls"), ("auto", "tool_calls")):
        choice = {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [named("get_weather")]}}
        request = body(CALL, tools=[WEATHER, ADD], tool_choice=choice, max_tokens=200)
        answer = server.client.chat.completions.create(**request).choices[0]
        assert (answer.finish_reason, len(answer.message.tool_calls)) == (reason, 1)
        form = [new for plan in server.executor.plans for new in plan.admitted][-1].params.structured_outputs
        assert "get_weather" in form.structural_tag and '"add' not in form.structural_tag
    choice = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "get_weather"}]}
    tools = [{"type": "function", **tool["function"]} for tool in (WEATHER, ADD)]
    said = server.client.responses.create(model="parrot", input=f"say:{CALL};", tools=tools, tool_choice=choice)
    assert [item.name for item in said.output if item.type == "function_call"] == ["get_weather"]


@pytest.mark.parametrize("mode, tools", [("sometimes", ["get_weather"]), ("auto", []), ("auto", ["fly"])])
def test_allowed_tools_that_mean_nothing(server: Running, mode: str, tools: list[str]) -> None:
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [named(name) for name in tools]}}
    response = server.http.post("/v1/chat/completions", json=body(CALL, tools=[WEATHER], tool_choice=choice))
    assert refused(response)["param"] == "tool_choice"


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def test_thoughts_are_apart(server: Running) -> None:
    message = server.http.post("/v1/chat/completions", json=body("<think>so so</think>Yes.", max_tokens=99)).json()
    message = message["choices"][0]["message"]
    assert (message["reasoning"], message["content"]) == ("so so", "Yes.")
    held = body("<think>x</think>", max_tokens=99, structured_outputs={"regex": ".*"})
    message = server.http.post("/v1/chat/completions", json=held).json()["choices"][0]["message"]
    assert (message["reasoning"], message["content"]) == ("x", "")  # thoughts come before the form


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "retrieval"}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "bad name"}}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": 5}}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": "always"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "add"}}}, "tool_choice"),
        (
            {"tools": [WEATHER], "tool_choice": "required", "response_format": {"type": "json_object"}},
            "tool_choice",
        ),
        (
            {
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}],
                "tool_choice": "required",
            },
            "tools",
        ),
    ],
)
def test_what_is_refused(server: Running, fields: dict[str, Any], param: str) -> None:
    for stream in (False, True):
        error = refused(server.http.post("/v1/chat/completions", json=body("hello", stream=stream, **fields)))
        assert error["param"] == param


def test_an_unknown_template_needs_the_option() -> None:
    with served() as running, pytest.raises(openai.BadRequestError, match="--tool-call-parser"):
        running.client.chat.completions.create(**body(CALL, tools=[WEATHER]))


def test_unknown_formats_are_refused_at_the_start() -> None:
    with pytest.raises(ConfigError, match="hermes"):
        check_formats("herms", None)
    with pytest.raises(ConfigError, match="qwen3"):
        check_formats(None, "quen3")


class _Tokens:
    """The part of a tokenizer that a format is made of."""

    has_response_template = False

    def __init__(self, template: str, special: str = "") -> None:
        self._template = template
        self.added_tokens = {0: special}
        self.special_ids = frozenset((0,)) if special else frozenset()

    def template_for(self, tools: object, template: str | None) -> str:
        return template or self._template


def answer_format(template: str, choice: Any = None, prompt: str = "", special: str = "") -> AnswerFormat:
    wish = tool_wish([WEATHER, ADD], choice, None)
    return answer_format_of(_Tokens(template, special), None, wish, SamplingParams(), prompt, None, None)  # type: ignore[arg-type]


def test_the_template_decides() -> None:
    found = answer_format("<tool_call> <think>", prompt="user: hi <think>\n")
    assert (found.tools, found.reasoning, found.thinking) == (tool_format("hermes"), reasoning_format("qwen3"), True)
    assert not found.shows_special
    assert not answer_format("<tool_call> <think>", prompt="<think>\n\n</think>\n\n").thinking
    hidden = answer_format("[TOOL_CALLS]", special="[TOOL_CALLS]")
    assert hidden.shows_special and not hidden.params(SamplingParams()).skip_special_tokens


def test_forced_calls_are_written_as_the_model_does() -> None:
    for template, begins in (("<tool_call>", "<tool_call>"), ("<|python_tag|>", '{"name'), ("<|python_start|>", "[")):
        found = answer_format(template, "required")
        assert found.form is not None and found.form.structural_tag is not None
        assert found.reasoning is None and found.form.after is None
        assert json.dumps(begins)[1:-1] in found.form.structural_tag


def test_strict_tools_are_held_to_their_schemas() -> None:
    strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
    for tools, held in (([WEATHER, ADD], False), ([strict, ADD], True)):
        wish = tool_wish(tools, "auto", None)
        found = answer_format_of(_Tokens("<tool_call>"), None, wish, SamplingParams(), "", None, None)  # type: ignore[arg-type]
        assert (found.form is not None) is held
        assert wish.strict == (frozenset({"get_weather"}) if held else frozenset())
    asked = SamplingParams(structured_outputs={"json_object": True})
    found = answer_format_of(_Tokens("<tool_call>"), None, wish, asked, "", None, None)  # type: ignore[arg-type]
    assert found.form is not None and "get_weather" in str(found.form.structural_tag)  # calls, or the form


def test_thoughts_stand_before_forms() -> None:
    asked = SamplingParams(structured_outputs={"json_object": True})
    for prompt, begun in (("hi", False), ("hi <think>\n", True)):
        wish = ToolWish()
        found = answer_format_of(_Tokens("<think></think>"), None, wish, asked, prompt, None, None)  # type: ignore[arg-type]
        assert found.form is not None and found.form.after is not None and found.form.after.begun is begun
        assert found.params(asked).structured_outputs == found.form
        reader = found.reader()
        said = [reader.read(text, False) for text in ("" if begun else "<think>", "hm</think>\n", "\n{", "}\n")]
        assert "".join(part.content for part in said) == "{}\n"
        assert "".join(part.reasoning for part in said) == "hm"
    one = tool_wish([WEATHER, ADD], "required", False)
    assert not one.parallel
    assert tool_wish(None, None, None) == tool_wish([], "auto", None) == ToolWish()


def test_thoughts_can_be_limited_and_hidden(server: Running) -> None:
    request = body("<think>so so</think>Yes.", max_tokens=99, thinking_token_budget=5, include_reasoning=False)
    message = server.http.post("/v1/chat/completions", json=request).json()["choices"][0]["message"]
    assert (message["reasoning"], message["content"]) == (None, "Yes.")
    extra = {name: request.pop(name) for name in ("thinking_token_budget", "include_reasoning")}
    assert streamed(server, request | {"extra_body": extra})[:2] == ("Yes.", "")
    params = [new for plan in server.executor.plans for new in plan.admitted][-1].params
    encode = server.service.tokenizer.encode
    assert params.thinking_token_budget == 5
    assert params.thinking.opener == tuple(encode("<think>", False)) and not params.thinking.implied
    server.http.post("/v1/completions", json={"prompt": "say:a;|", "thinking_token_budget": 7})
    params = [new for plan in server.executor.plans for new in plan.admitted][-1].params
    assert params.thinking_token_budget == 7 and params.thinking is not None
