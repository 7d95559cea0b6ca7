"""Every format, whole and malformed, and every way to cut its text: the result must be the same."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import dataclass, field
from typing import Any

import pytest

from quire.errors import ConfigError
from quire.text.format_parser import CallArguments, CallEnd, CallStart, Content, FormatParser, Reasoning
from quire.text.formats import (
    REASONING_FORMATS,
    TOOL_FORMATS,
    hidden_markers,
    reasoning_format,
    reasoning_format_of,
    tool_format,
    tool_format_of,
)
from quire.text.streamed import HEADS

SCHEMAS = {"get_weather": {"properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}}
PARIS = ("get_weather", {"city": "Paris", "days": 3})
ADD = ("add", {"a": 1, "b": [2, {"c": None}]})


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


def as_json(name: str, arguments: Any, key: str = "arguments") -> str:
    return json.dumps({"name": name, key: arguments})


WEATHER, SUM = as_json(*PARIS), as_json(*ADD)
# format -> a text with both calls, as its models write it
BOTH = {
    "hermes": f"<tool_call>\n{WEATHER}\n</tool_call>\n<tool_call>\n{SUM}\n</tool_call>",
    "longcat": f"<longcat_tool_call>{WEATHER}</longcat_tool_call><longcat_tool_call>{SUM}</longcat_tool_call>",
    "hunyuan_a13b": f"<tool_calls>[{WEATHER}, {SUM}]</tool_calls>",
    "llama3_json": f"{as_json(*PARIS, 'parameters')}; {as_json(*ADD, 'parameters')}",
    "llama4_pythonic": "[get_weather(city='Paris', days=3), add(a=1, b=[2, {'c': None}])]",
    "lfm2": "<|tool_call_start|>[get_weather(city='Paris', days=3), add(a=1, b=[2, {'c': null}])]<|tool_call_end|>",
    "mistral": f"[TOOL_CALLS] [{WEATHER}, {SUM}]",
    "granite": f"<|tool_call|>[{WEATHER}, {SUM}]",
    "phi4_mini_json": f"functools[{WEATHER}, {SUM}]",
    "deepseek_v3": (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
        + json.dumps(PARIS[1])
        + "\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>add<｜tool▁sep｜>"
        + json.dumps(ADD[1])
        + "<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
    ),
    "kimi_k2": (
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
        + json.dumps(PARIS[1])
        + "<|tool_call_end|><|tool_call_begin|>functions.add:1<|tool_call_argument_begin|>"
        + json.dumps(ADD[1])
        + "<|tool_call_end|><|tool_calls_section_end|>"
    ),
    "glm45": (
        "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n<arg_key>days</arg_key>\n"
        "<arg_value>3</arg_value>\n</tool_call>\n<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n"
        '<arg_key>b</arg_key>\n<arg_value>[2, {"c": null}]</arg_value>\n</tool_call>'
    ),
    "qwen3_coder": (
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
        "</function>\n</tool_call>\n<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\n"
        '[2, {"c": null}]\n</parameter>\n</function>\n</tool_call>'
    ),
    "minimax_m2": (
        '<minimax:tool_call>\n<invoke name="get_weather">\n<parameter name="city">Paris</parameter>\n'
        '<parameter name="days">3</parameter>\n</invoke>\n<invoke name="add">\n<parameter name="a">1</parameter>\n'
        '<parameter name="b">[2, {"c": null}]</parameter>\n</invoke>\n</minimax:tool_call>'
    ),
    "openai": (
        "<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>"
        + json.dumps(PARIS[1])
        + "<|call|><|start|>assistant to=functions.add<|channel|>commentary json<|message|>"
        + json.dumps(ADD[1])
        + "<|call|>"
    ),
    "functiongemma": (
        "<start_function_call>call:get_weather{city:<escape>Paris<escape>,days:3}<end_function_call>"
        "<start_function_call>call:add{a:1,b:[2,{c:null}]}<end_function_call>"
    ),
}
BOTH["deepseek_v31"] = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>"
    + json.dumps(PARIS[1])
    + "<｜tool▁call▁end｜><｜tool▁call▁begin｜>add<｜tool▁sep｜>"
    + json.dumps(ADD[1])
    + "<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
)
BOTH["mistral_args"] = f"[TOOL_CALLS]get_weather[ARGS]{json.dumps(PARIS[1])}[TOOL_CALLS]add[ARGS]{json.dumps(ADD[1])}"
BOTH["cohere_command3"] = (
    "<|START_ACTION|>["
    + json.dumps({"tool_call_id": "0", "tool_name": PARIS[0], "parameters": PARIS[1]})
    + ", "
    + json.dumps({"tool_call_id": "1", "tool_name": ADD[0], "parameters": ADD[1]})
    + "]<|END_ACTION|>"
)
BOTH["deepseek_v32"] = (
    '<｜DSML｜function_calls>\n<｜DSML｜invoke name="get_weather">\n<｜DSML｜parameter name="city" string="true">Paris'
    '</｜DSML｜parameter>\n<｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
    '<｜DSML｜invoke name="add">\n<｜DSML｜parameter name="a" string="false">1</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="b" string="false">[2, {"c": null}]</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
    "</｜DSML｜function_calls>"
)
BOTH["apertus"] = f"<|tools_prefix|>[{json.dumps(dict([PARIS]))}, {json.dumps(dict([ADD]))}]<|tools_suffix|>"
BOTH["gemma4"] = (
    '<|tool_call>call:get_weather{city:<|"|>Paris<|"|>,days:3}<tool_call|>'
    "<|tool_call>call:add{a:1,b:[2,{c:null}]}<tool_call|>"
)
BOTH["internlm"] = "".join(
    f"<|action_start|><|plugin|>\n{as_json(*call, 'parameters')}<|action_end|>" for call in (PARIS, ADD)
)
BOTH["granite-20b-fc"] = f"<function_call> {WEATHER}\n<function_call> {SUM}"
BOTH["olmo3"] = '<function_calls>get_weather(city="Paris", days=3)\nadd(a=1, b=[2, {"c": None}])</function_calls>'
BOTH["xlam"] = f"[{WEATHER}, {SUM}]"
BOTH["seed_oss"] = BOTH["qwen3_coder"].replace("tool_call>", "seed:tool_call>")
BARE = {"llama3_json", "llama4_pythonic", "xlam"}
IDS = {"kimi_k2": ["functions.get_weather:0", "functions.add:1"], "cohere_command3": ["0", "1"]}

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
