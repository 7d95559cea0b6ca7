"""Answers read by a tokenizer's own response template: the same whatever the pieces, and content where it fails."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from small_tokenizers import byte_level, small, wrapped

from quire.core.params import SamplingParams
from quire.errors import ConfigError
from quire.text.answer_format import LIBRARY, answer_format_of
from quire.text.format_parser import CallArguments, CallStart, Content, Reasoning
from quire.text.template_parser import TemplateParser
from quire.text.tokenizer import Tokenizer
from quire.text.tool_choice import ToolWish

pytest.importorskip("transformers.utils.chat_parsing")

TEMPLATE = {
    "start_anchor": "<assistant>",
    "defaults": {"role": "assistant"},
    "fields": {
        "thinking": {"open": "<hm>", "close": "</hm>", "content": "text"},
        "tool_calls": {"open": "<call>", "close": "</call>", "content": "json", "repeats": True},
        "content": {"content": "text"},
    },
}
CALL = json.dumps({"name": "add", "arguments": {"a": 1}})
PROMPT = "hello <assistant>"


def tokenizer() -> Tokenizer:
    found = wrapped(byte_level())
    found.library.response_template = TEMPLATE
    found.given_template = "{{ messages }}"
    return found


def read(pieces: list[str], prompt: str = PROMPT) -> tuple[str, str, list[Any]]:
    parser = TemplateParser(tokenizer().response_parser(prompt, []))
    content = thoughts = ""
    calls: list[Any] = []
    for delta in itertools.chain(*(parser.push(piece) for piece in pieces), parser.finish()):
        if isinstance(delta, Content):
            content += delta.text
        elif isinstance(delta, Reasoning):
            thoughts += delta.text
        elif isinstance(delta, CallStart):
            calls.append([delta.name, ""])
        elif isinstance(delta, CallArguments):
            calls[delta.index][1] += delta.text
    return content, thoughts, [(name, json.loads(text)) for name, text in calls]


@pytest.mark.parametrize(
    ("text", "prompt", "expected"),
    [
        (f"<hm>so</hm>Yes. <call>{CALL}</call><call>{CALL}</call>", PROMPT, ("Yes. ", "so", [("add", {"a": 1})] * 2)),
        ("so</hm>Yes.", PROMPT + "<hm>", ("Yes.", "so", [])),
        ("Yes < no.", PROMPT, ("Yes < no.", "", [])),
        ('Yes <call>{"name"</call>no', PROMPT, None),  # the library cannot read it: nothing may be lost
    ],
)
def test_every_split_gives_the_same(text: str, prompt: str, expected: Any) -> None:
    whole = read([text], prompt)
    if expected is not None:
        assert whole == expected
        for place in range(len(text) + 1):
            assert read([text[:place], text[place:]], prompt) == whole
        assert read(list(text), prompt) == whole
    else:
        assert '{"name"' in whole[0] and whole[0].endswith("no")


def test_it_is_used_where_nothing_else_is_known() -> None:
    wish, params = ToolWish("auto", {"add": {}}), SamplingParams()
    found = answer_format_of(tokenizer(), None, wish, params, PROMPT, None, None)
    assert found.library is not None and found.shows_special
    said = found.reader().read(f"<hm>so</hm>Yes<call>{CALL}</call>", finished=True)
    assert (said.content, said.reasoning, said.calls[0]["function"]["name"]) == ("Yes", "so", "add")
    assert answer_format_of(tokenizer(), "<tool_call>", wish, params, PROMPT, None, None).library is None
    assert answer_format_of(tokenizer(), "<tool_call>", wish, params, PROMPT, LIBRARY, None).library is not None
    with pytest.raises(ConfigError, match=LIBRARY):
        answer_format_of(small("byte_level"), "<tool_call>", wish, params, PROMPT, LIBRARY, None)
