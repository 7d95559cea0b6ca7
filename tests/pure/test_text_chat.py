"""Conversations become prompts; mistakes are named by their place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small_tokenizers import byte_level, wrapped

from quire.errors import ConfigError, ValidationError
from quire.text import ChatOptions, Tokenizer, prompt_text, read_template

STRING = "{% for message in messages %}[{{ message.role }}|{{ message.content }}]{% endfor %}"
PARTS = (
    "{% for message in messages %}[{{ message.role }}{% if message.content is string %}STRING{% else %}"
    "{% for part in message['content'] %}|{{ part.text }}{% endfor %}{% endif %}]{% endfor %}"
)
CALLS = (
    "{% for message in messages %}{% for call in message.tool_calls or [] %}"
    "{{ call.function.name }}({{ call.function.arguments | tojson }}){% endfor %}"
    "<{{ message.content }}>{{ message.name or '' }}{{ message.reasoning or '' }}{% endfor %}"
)


def tokenizer(template: str) -> Tokenizer:
    return wrapped(byte_level(), chat_template=template)


def text_of(template: str, messages: Any, **options: Any) -> str:
    return prompt_text(tokenizer(template), messages, ChatOptions(**options))


def test_string_and_parts_are_the_same_to_a_template_of_strings() -> None:
    parts = [{"type": "text", "text": "a"}, "b", {"type": "refusal", "refusal": "c"}]
    assert text_of(STRING, [{"role": "user", "content": "a"}]) == "[user|a]"
    assert text_of(STRING, [{"role": "user", "content": parts}]) == "[user|a\nb\nc]"


def test_a_template_that_loops_over_parts_gets_parts() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert text_of(PARTS, [{"role": "user", "content": parts}]) == "[user|a|b]"
    assert text_of(PARTS, [{"role": "user", "content": "a"}]) == "[user|a]"
    assert text_of(PARTS, [{"role": "user", "content": "a"}], content_format="string") == "[userSTRING]"


@pytest.mark.parametrize(
    ("loop", "as_parts"),
    [
        ("{% for part in message.content %}{% endfor %}", True),
        ("{% set body = message['content'] %}{% for part in body %}{% endfor %}", True),
        ("{% for part in message.content | selectattr('type') %}{% endfor %}", True),
        ("{% for call in message.tool_calls %}{% endfor %}{{ message.content }}", False),
        ("{% generation %}{{ message.content }}{% endgeneration %}", False),
    ],
)
def test_what_the_template_reads_is_seen(loop: str, as_parts: bool) -> None:
    template = "{% for message in messages %}" + loop + "{{ message.content is string }}{% endfor %}"
    assert text_of(template, [{"role": "user", "content": "a"}]).endswith(str(not as_parts))


def test_tool_calls_and_tool_answers() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "name": "add", "content": "2"},
        {"role": "assistant", "content": "two", "reasoning_content": "hm"},
    ]
    assert text_of(CALLS, messages) == 'add({"a": 1})<><2>add<two>hm'
    empty = {"function": {"name": "go", "arguments": ""}}
    assert text_of(CALLS, [{"role": "assistant", "tool_calls": [empty]}]) == "go({})<>"


@pytest.mark.parametrize(
    ("messages", "place"),
    [
        ([], "messages"),
        ("hello", "messages"),
        (["hello"], "messages[0]"),
        ([{"content": "x"}], "messages[0].role"),
        ([{"role": "user", "content": "x"}, {"role": "user"}], "messages[1].content"),
        ([{"role": "user", "content": 3}], "messages[0].content"),
        ([{"role": "user", "content": [3]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"text": "x"}]}], "messages[0].content[0].type"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
        ([{"role": "user", "content": ["a", {"type": "image_url", "image_url": {}}]}], "messages[0].content[1].type"),
        ([{"role": "user", "content": [{"type": "input_audio"}]}], "messages[0].content[0].type"),
        ([{"role": "user", "content": "x", "name": 3}], "messages[0].name"),
        ([{"role": "assistant", "tool_calls": 3}], "messages[0].tool_calls"),
        ([{"role": "assistant", "tool_calls": [{}]}], "messages[0].tool_calls[0].function"),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
            "messages[0].tool_calls[0].function.arguments",
        ),
    ],
)
def test_mistakes_are_named_by_their_place(messages: Any, place: str) -> None:
    with pytest.raises(ValidationError) as caught:
        text_of(CALLS, messages)
    assert caught.value.field == place


def test_an_image_is_said_to_be_unsupported() -> None:
    with pytest.raises(ValidationError, match="not supported by this model"):
        text_of(STRING, [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}])


def test_template_variables_are_limited() -> None:
    deep: Any = 1
    for _ in range(40):
        deep = [deep]
    for given in ({"a": list(range(200))}, {"a": deep}, {"a": "x" * 20000}):
        with pytest.raises(ValidationError, match="chat_template_kwargs"):
            text_of(STRING, [{"role": "user", "content": "a"}], template_kwargs=given)


def test_reading_a_template(tmp_path: Path) -> None:
    path = tmp_path / "t.jinja"
    path.write_text("from a file")
    assert read_template(str(path)) == "from a file"
    assert read_template("{{ messages }}") == "{{ messages }}"
    assert read_template(None) is None
    with pytest.raises(ConfigError, match="neither"):
        read_template(str(tmp_path / "absent.jinja"))
    for wrong in ("{% if %}", "{% for message in messages %}", "{{ messages"):
        with pytest.raises(ConfigError, match="no valid Jinja template.*in line 1"):
            read_template(wrong)
