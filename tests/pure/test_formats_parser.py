"""Every format, whole and malformed, and every way to cut its text: the result must be the same."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import dataclass, field
from typing import Any

import pytest
from format_texts import ADD, BARE, BOTH, IDS, PARIS, SCHEMAS, SUM

from quire.errors import ConfigError
from quire.text.format_parser import CallArguments, CallEnd, CallStart, Content, FormatParser, Reasoning
from quire.text.formats import hidden_markers
from quire.text.non_json_calls import NON_JSON, Elements
from quire.text.reasoning_formats import REASONING_FORMATS, reasoning_format, reasoning_format_of
from quire.text.streamed_arguments import HEADS
from quire.text.tool_formats import TOOL_FORMATS, tool_format, tool_format_of


@dataclass
class Read:
    """What came out of a text."""

    content: str = ""
    reasoning: str = ""
    calls: list[tuple[str, Any]] = field(default_factory=list)  # the text of the arguments where a call has no end
    arguments: list[str] = field(default_factory=list)
    ids: list[str | None] = field(default_factory=list)


def read(pieces: list[str], tools: str | None, reasoning: str | None = None, thinking: bool = False) -> Read:
    parser = FormatParser(
        tool_format(tools) if tools else None,
        reasoning_format(reasoning) if reasoning else None,
        thinking,
        SCHEMAS,
    )
    found = Read()
    arguments = found.arguments
    ended: set[int] = set()
    for delta in itertools.chain(*(parser.push(piece) for piece in pieces), parser.finish()):
        if isinstance(delta, Content):
            found.content += delta.text
        elif isinstance(delta, Reasoning):
            found.reasoning += delta.text
        elif isinstance(delta, CallStart):
            assert delta.index == len(arguments)
            found.calls.append((delta.name, None))
            found.ids.append(delta.id)
            arguments.append("")
        elif isinstance(delta, CallArguments):
            arguments[delta.index] += delta.text
        elif isinstance(delta, CallEnd):
            found.calls[delta.index] = (found.calls[delta.index][0], json.loads(arguments[delta.index]))
            ended.add(delta.index)
    for index, text in enumerate(arguments):
        if index not in ended:
            found.calls[index] = (found.calls[index][0], text)
    return found


# (format, reasoning format, text): whole answers, cut-off ones and broken ones
TEXTS: list[tuple[str, str | None, str]] = []
for _name, _text in BOTH.items():
    TEXTS += [(_name, None, _text), (_name, None, _text[: len(_text) * 2 // 3]), (_name, None, _text[3:])]
    TEXTS += [(_name, None, f"Let me see.\n\n{_text}\nDone <b>"), (_name, None, _text.replace("}", "", 1))]
    TEXTS += [(_name, "qwen3", f"<think>\nI think <tool_c {_text[:30]}</think>\n\n{_text}")]
    TEXTS += [(_name, "deepseek_r1", f"I think</thin </think>Yes. {_text}")]
TEXTS += [
    ("hermes", None, '<tool_call>{"name": "f", "arguments": {"x": "</tool_call>\\""}}</tool_call>'),
    ("hermes", None, f"<tool_call>{{bad</tool_call> and <tool_call>{SUM}</tool_call>"),
    ("hermes", None, f'<tool_call>{{"name": "x</tool_call> and <tool_call>{SUM}</tool_call>'),
    ("hermes", None, "<tool_call" * 5 + "<<tool_call><tool_call>{}</tool_call>"),
    ("hermes", None, "<tool_call>{" * 9 + "}</tool_call>" * 3),
    ("hermes", None, f"  \n<tool_call>{SUM}</tool_call>  \n  <tool_call>{SUM}</tool_call>\n\n"),
    ("openai", "openai_gptoss", "<|channel|>analysis<|message|>Hmm.<|end|><|start|>assistant" + BOTH["openai"]),
    (
        "openai",
        "openai_gptoss",
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes.",
    ),
    ("mistral", "mistral", '[THINK]why[/THINK][TOOL_CALLS]add[ARGS]{"a": 1}[TOOL_CALLS]add{"a": 2}'),
    ("llama3_json", None, '<|python_tag|>{"name": "f", "parameters": {"x": "}"}} {'),
    ("llama3_json", None, '{"city": "Paris"} is all I know'),
    ("llama4_pythonic", None, "[1, 2] and [f(x=']')]"),
    ("llama4_pythonic", None, "[f(x=__import__('os').system('id'))]"),
]


@pytest.mark.parametrize("name", BOTH)
def test_both_calls_are_found(name: str) -> None:
    found = read([BOTH[name]], name)
    assert (found.calls, found.content) == ([PARIS, ADD], "")
    assert found.ids == IDS.get(name, [None, None])


@pytest.mark.parametrize("name", sorted(set(BOTH) - BARE))
def test_content_around_calls_is_kept(name: str) -> None:
    found = read([f"Let me see.\n\n{BOTH[name]}\nDone <b>"], name)
    assert found.calls == [PARIS, ADD]
    assert found.content == "Let me see.\n\n\nDone <b>"


@pytest.mark.parametrize("name", BOTH)
def test_reasoning_comes_first(name: str) -> None:
    found = read([f"<think>\nfirst <tool_call>\n</think>\n\n{BOTH[name]}"], name, "qwen3")
    assert (found.reasoning, found.content, found.calls) == ("\nfirst <tool_call>\n", "", [PARIS, ADD])
    found = read([f"first</think>\n\nYes. {'' if name in BARE else BOTH[name]}"], name, "qwen3", thinking=True)
    assert (found.reasoning, found.content.rstrip()) == ("first", "\n\nYes.")


def pieces_of(text: str, cuts: list[int]) -> list[str]:
    places = [0, *sorted(cuts), len(text)]
    return [text[first:last] for first, last in itertools.pairwise(places)]


@pytest.mark.parametrize("number", range(len(TEXTS)))
def test_every_split_gives_the_same(number: int) -> None:
    """All cuts into two, every character alone, and random cuts into many."""
    tools, reasoning, text = TEXTS[number]
    whole = read([text], tools, reasoning)
    ways = [[place] for place in range(len(text) + 1)] + [list(range(len(text)))]
    chance = random.Random(number)
    ways += [[chance.randrange(len(text) + 1) for _ in range(chance.randrange(2, 30))] for _ in range(12)]
    for cuts in ways:
        assert read(pieces_of(text, cuts), tools, reasoning) == whole, cuts


@pytest.mark.parametrize("name", BOTH)
def test_nothing_is_lost_when_a_text_breaks_off(name: str) -> None:
    """Whatever is not told as a call is told as content, without the markers that only separate."""
    text = BOTH[name]
    silent = tool_format(name).silent
    for end in range(len(text)):
        found = read([text[:end]], name)
        if found.calls:
            for (tool, arguments), said, whole in zip(found.calls, found.arguments, (PARIS, ADD), strict=False):
                assert tool == whole[0]
                assert arguments == whole[1] or json.dumps(whole[1]).startswith(said)
        else:
            left = text[:end]
            for mark in silent:
                left = left.replace(mark, "")
            assert found.content == left


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hermes", "<tool_call>{bad}</tool_call> so"),
        ("hermes", '<tool_call>{"name": 5, "arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "f", "arguments": [1]}</tool_call>'),
        ("hermes", "<tool_call> is how one calls a tool"),
        ("hermes", "<tool_call>" + "[" * 5000 + "</tool_call>"),
        ("llama3_json", '{"city": "Paris"}'),
        ("llama3_json", 'He said {"name": "f", "parameters": {}}'),
        ("llama4_pythonic", "[f(x=__import__('os').system('id'))]"),
        ("llama4_pythonic", "[f(1)]"),
        ("llama4_pythonic", "[f(x=1 + 1)]"),
        ("llama4_pythonic", "[1, 2, 3]"),
        ("llama4_pythonic", "[" + "(" * 3000),
        ("qwen3_coder", "<tool_call><function=f><parameter=a>1</function></tool_call>"),
        ("functiongemma", "<start_function_call>call:f{a:<escape>1}<end_function_call>"),
        ("functiongemma", "<start_function_call>call:f{a:" + "[" * 3000 + "}<end_function_call>"),
        ("glm45", "<tool_call>f<arg_key>a</arg_key></tool_call>"),
        ("kimi_k2", "<|tool_call_begin|>functions.f:0{}<|tool_call_end|>"),
    ],
)
def test_what_is_no_call_is_content(name: str, text: str) -> None:
    found = read([text], name)
    assert (found.content, found.calls) == (text, [])


def test_a_broken_call_does_not_hide_the_next() -> None:
    found = read([f'<tool_call>{{"name": "x</tool_call> and <tool_call>{SUM}</tool_call>'], "hermes")
    assert found.calls == [ADD]
    assert found.content == '<tool_call>{"name": "x</tool_call> and '


def test_text_comes_as_soon_as_it_is_certain() -> None:
    parser = FormatParser(tool_format("hermes"), reasoning_format("qwen3"))
    assert parser.push("<think>a") == [Reasoning("a")]
    assert parser.push("b</thi") == [Reasoning("b")]
    assert parser.push("nk>c <") == [Content("c ")]
    assert parser.push("tool") == []
    assert parser.push("box") == [Content("<toolbox")]
    deltas = parser.push(f"<tool_call>{SUM}</tool_call>")
    assert [type(delta) for delta in deltas] == [CallStart, CallArguments, CallEnd]
    assert parser.finish() == []


JSON_FORMATS = [name for name in BOTH if tool_format(name).regions[0].reader in HEADS]


@pytest.mark.parametrize("name", JSON_FORMATS)
def test_arguments_come_as_they_are_written(name: str) -> None:
    """From the beginning of the arguments on, every character of them is told when it has come."""
    parser = FormatParser(tool_format(name))
    text, said = BOTH[name], ""
    for place, character in enumerate(text):
        for delta in parser.push(character):
            if isinstance(delta, CallArguments) and delta.index == 0:
                said += delta.text
        if said and len(said) < len(json.dumps(PARIS[1])):
            assert text[: place + 1].endswith(said)
    assert json.loads(said) == PARIS[1]


NON_JSON_FORMATS = [name for name in BOTH if tool_format(name).regions[0].reader in NON_JSON]


@pytest.mark.parametrize("name", NON_JSON_FORMATS)
def test_other_arguments_come_one_by_one(name: str) -> None:
    """What is told is a growing beginning of JSON, and texts within elements grow while they are written."""
    parser = FormatParser(tool_format(name), schemas=SCHEMAS)
    whole, said, told = json.dumps(PARIS[1]), "", []
    for character in BOTH[name]:
        for delta in parser.push(character):
            if isinstance(delta, CallArguments) and delta.index == 0:
                said += delta.text
                told.append(said)
                assert whole.startswith(said)
    assert said == whole and told[-2].startswith('{"city": "Paris"')
    writing = NON_JSON[tool_format(name).regions[0].reader]
    assert ('{"city": "Par' in told) == (isinstance(writing, Elements) and writing.opens is not None)


@pytest.mark.parametrize(
    ("name", "text", "calls", "content"),
    [
        # A call that breaks behind its first argument stays as it was told; the rest is content.
        ("llama4_pythonic", "[f(a=1, b=2 + 2)] so", [("f", '{"a": 1')], " b=2 + 2)] so"),
        (
            "qwen3_coder",
            "<tool_call><function=f><parameter=a>1</parameter>oh</parameter></function></tool_call>",
            [("f", '{"a": 1')],
            "oh</parameter></function>",
        ),
        # One that was cut off keeps the arguments that were complete.
        ("qwen3_coder", "<tool_call><function=f><parameter=a>1</parameter><parameter=b>2", [("f", '{"a": 1')], ""),
        ("functiongemma", "<start_function_call>call:f{a:<escape>x<escape>,b:<esc", [("f", '{"a": "x"')], ""),
        # A text that was cut off has its beginning; what looks like an end within it is text.
        (
            "qwen3_coder",
            "<tool_call><function=get_weather><parameter=city>\n\nA </par <b>\n</function>\n\n</parameter>",
            [("get_weather", '{"city": "\\nA </par <b>\\n</function>\\n"')],
            "",
        ),
        (
            "qwen3_coder",
            '<tool_call><function=get_weather><parameter=city>a"b</para',
            [("get_weather", '{"city": "a\\"b')],
            "",
        ),
        (
            "glm45",
            "<tool_call>get_weather<arg_key>city</arg_key><arg_value>x</tool_call> y",
            [("get_weather", '{"city": "x')],
            " y",
        ),
        (
            "kimi_k3",
            '<|open|>call tool="f" index="1"<|sep|><|open|>argument key="a" type="string"<|sep|>\nx',
            [("f", '{"a": "\\nx')],
            "",
        ),
        # A second call that is none, behind a first that is one.
        ("llama4_pythonic", "[f(a=1), g(b)] so", [("f", {"a": 1})], ", g(b)] so"),
        # Marks within arguments are text.
        (
            "qwen3_coder",
            "<tool_call><function=f><parameter=a></function> <b>x</b></parameter></function></tool_call>",
            [("f", {"a": "</function> <b>x</b>"})],
            "",
        ),
        ("llama4_pythonic", "[f(a='),]', b={'x': (1, 2)})]", [("f", {"a": "),]", "b": {"x": [1, 2]}})], ""),
        (
            "functiongemma",
            "<start_function_call>call:f{a:<escape>},<escape>}<end_function_call>",
            [("f", {"a": "},"})],
            "",
        ),
        ("glm45", "<tool_call>f</tool_call>", [("f", {})], ""),
        ("hy_v3", "<tool_calls><tool_call>f<tool_sep></tool_call></tool_calls>", [("f", {})], ""),
        (
            "hy_v4",
            "<tool_calls><tool_call>f<arg_key>a</arg_key><arg_value>1</arg_value></tool_call>",
            [("f", {"a": 1})],
            "",
        ),
        (
            "hy_v3",
            "<tool_call:opensource>f<tool_sep:opensource>\n<arg_key:opensource>a</arg_key:opensource>"
            "<arg_value:opensource>1</arg_value:opensource></tool_call:opensource>",
            [("f", {"a": 1})],
            "",
        ),
        (
            "kimi_k3",
            '<|open|>response<|sep|>Yes.<|close|>response<|sep|><|open|>tools<|sep|><|open|>call tool="f" index="1"<|sep|>'
            '<|open|>json type="object"<|sep|>{"a": [1]}<|close|>json<|sep|><|close|>call<|sep|><|close|>tools<|sep|>',
            [("f", {"a": [1]})],
            "Yes.",
        ),
        ("minicpm5", '<function name="f"></function>', [("f", {})], ""),
        ("xlam", f"Yes.\n```json\n[{SUM}]\n```", [ADD], "Yes.\n"),
        ("xlam", f"[TOOL_CALLS] [{SUM}]", [ADD], ""),
        ("xlam", f"<tool_call>[{SUM}]</tool_call>", [ADD], ""),
        ("xlam", '```json\n{"a": 1}\n``` it is', [], '```json\n{"a": 1}\n``` it is'),
        (
            "minicpm5",
            '<function name="f"><param name="a"><![CDATA[1 < 2]]></param></function>',
            [("f", {"a": "1 < 2"})],
            "",
        ),
        (
            "deepseek_v4",
            '<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>',
            [("f", {})],
            "",
        ),
        ("glm45", "<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>1e999</arg_value>", [("f", '{"a": "inf"')], ""),
    ],
)
def test_calls_that_are_not_json(name: str, text: str, calls: list, content: str) -> None:
    for pieces in ([text], list(text)):
        found = read(pieces, name)
        assert (found.calls, found.content) == (calls, content)


def test_arguments_are_passed_on_as_the_model_writes_them() -> None:
    call = '<tool_call>{"name": "f", "arguments": %s}</tool_call>'
    assert read([call % '{"x": NaN}'], "hermes").arguments == ['{"x": NaN}']
    found = read([call % '{"x": "two\nlines\t"}'], "hermes")
    assert found.calls == [("f", {"x": "two\nlines\t"})]  # control characters are written as JSON wants them
    found = read([call % '{"x": [1} and' + " more"], "hermes")
    assert found.arguments == ['{"x": [1'] and found.content == "} and} more"
    found = read(['<tool_call>{"name": "f", "arguments": {"x": 1}} and so on</tool_call>'], "hermes")
    assert (found.calls, found.content) == ([("f", {"x": 1})], "} and so on")
    # Another order of keys, or arguments as a string, come in one piece.
    assert read(['<tool_call>{"arguments": {"x": 1}, "name": "f"}</tool_call>'], "hermes").calls == [("f", {"x": 1})]
    assert read([call % '"{\\"x\\": 1}"'], "hermes").calls == [("f", {"x": 1})]


def test_many_broken_calls_take_no_time() -> None:
    found = read(["<tool_call>{" * 20_000], "hermes")
    assert found.content == "<tool_call>{" * 20_000
    for name, text in (
        ("qwen3_coder", "<tool_call><function=f>x" + "</function>x" * 20_000),
        ("qwen3_coder", "<tool_call>" + ">" * 200_000),
        ("glm45", "<tool_call>f<arg_key>" + "<arg_key>" * 20_000),
        ("functiongemma", "<start_function_call>call:f{a:" + "<escape>" * 20_000),
    ):
        assert read([text], name).content == text


def test_strings_stay_strings_where_the_schema_says_so() -> None:
    text = "<tool_call>get_weather<arg_key>city</arg_key><arg_value>75001</arg_value></tool_call>"
    assert read([text], "glm45").calls == [("get_weather", {"city": "75001"})]


@pytest.mark.parametrize(
    ("template", "tools", "reasoning"),
    [
        ("{{ '<tool_call>' }}", "hermes", None),
        ("<tool_call><think></think>", "hermes", "qwen3"),
        ("<tool_call>\n<function=name>", "qwen3_coder", None),
        ("<tool_call><arg_key>", "glm45", None),
        ("[TOOL_CALLS][THINK]", "mistral", "mistral"),
        ("<|channel|>analysis to=functions.", "openai", "openai_gptoss"),
        ("<|start_of_role|><|tool_call|>", "granite", None),
        ("<｜tool▁call▁begin｜>\n```json</think>", "deepseek_v3", "qwen3"),
        ("<｜tool▁call▁begin｜></think>", "deepseek_v31", "qwen3"),
        ("[TOOL_CALLS]name[ARGS]", "mistral_args", None),
        ("{{ message.content }}", None, None),
    ],
)
def test_a_template_shows_its_format(template: str, tools: str | None, reasoning: str | None) -> None:
    found, thoughts = tool_format_of(template), reasoning_format_of(template)
    assert (found and found.name, thoughts and thoughts.name) == (tools, reasoning)


def test_the_table_is_sound() -> None:
    names = [name for item in TOOL_FORMATS for name in (item.name, *item.aliases)]
    assert len(set(names)) == len(names)
    thoughts = [name for item in REASONING_FORMATS for name in (item.name, *item.aliases)]
    assert len(set(thoughts)) == len(thoughts)
    assert set(BOTH) == {item.name for item in TOOL_FORMATS}
    for find in (tool_format, reasoning_format):
        with pytest.raises(ConfigError, match="hermes|qwen3"):
            find("herms")


def test_markers_that_special_tokens_hide() -> None:
    assert hidden_markers(tool_format("mistral").markers, ["</s>", "[TOOL_CALLS]"])
    assert not hidden_markers(tool_format("hermes").markers, ["</s>", "<|im_end|>", ""])


@pytest.mark.parametrize("found", REASONING_FORMATS, ids=lambda item: item.name)
def test_thoughts_of_every_format_however_they_are_cut(found: Any) -> None:
    for closer in found.closers:
        begins = "" if found.implied else found.opener
        text = f"{begins}so <{closer[:-1]} {closer}Yes <{found.opener[:-1]}"
        whole = read([text], None, found.name)
        # Spaces before an answer belong to it.
        assert (whole.reasoning, whole.content) == (f"so <{closer[:-1]} ", f"Yes <{found.opener[:-1]}")
        for place in range(len(text) + 1):
            assert read([text[:place], text[place:]], None, found.name) == whole
        assert read(list(text), None, found.name) == whole
