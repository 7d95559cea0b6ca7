"""Structural tags, forms behind thoughts, and calls: what the grammars let through, format by format."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from quire.core.structured import StructuredOutputsParams, Thoughts
from quire.errors import ValidationError
from quire.grammar import Constraint, Grammars, MaskFiller, MaskWish, Vocabulary
from quire.grammar.constraint import mask_width
from quire.text.calls import calls_or_form, calls_within_text, only_calls, text_without_calls
from quire.text.format_parser import CallArguments, CallStart, Content, FormatParser
from quire.text.formats import ToolFormat
from quire.text.tool_formats import PLAIN_LIST, TOOL_FORMATS

SPECIAL = ("<|call|>", "<|message|>", "<|channel|>", "<|constrain|>", "[TOOL_CALLS]", "</think>", "<｜tool▁sep｜>")
END = 256
FILLER = MaskFiller(1)


class Tokens:
    """One token for each byte, an end, and some marks that are special tokens; `end` is an end too."""

    vocab_size = 257 + len(SPECIAL)
    special_ids = frozenset(range(256, vocab_size))

    def token_bytes(self, token_id: int) -> bytes:
        if token_id < 256:
            return bytes([token_id])
        return b"<end>" if token_id == END else SPECIAL[token_id - 257].encode()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        found: list[int] = []
        while text:
            mark = next((index for index, name in enumerate(SPECIAL) if text.startswith(name)), None)
            if mark is None:
                found += text[0].encode()
                text = text[1:]
            else:
                found.append(257 + mark)
                text = text[len(SPECIAL[mark]) :]
        return found


TOKENS = Tokens()
GRAMMARS = Grammars(lambda: Vocabulary(TOKENS, TOKENS.vocab_size, (END, 257)))
SCHEMAS: dict[str, dict[str, Any]] = {
    "get_weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string", "enum": ["Paris", "Rome"]},
            "days": {"type": "integer", "minimum": 1, "maximum": 9},
        },
        "required": ["city", "days"],
        "additionalProperties": False,
    },
    "add": {
        "type": "object",
        "properties": {"b": {"$ref": "#/$defs/pair"}},
        "required": ["b"],
        "additionalProperties": False,
        "$defs": {"pair": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 2}},
    },
}
WRITTEN = [item for item in (*TOOL_FORMATS, PLAIN_LIST) if item.writing is not None]


def takes(wish: StructuredOutputsParams, text: str) -> bool:
    """Whether the whole text is an output of this form."""
    constraint = GRAMMARS.constraint(wish)
    tokens = TOKENS.encode(text)
    return constraint.advance([*tokens, END]) == len(tokens) + 1


def walk(constraint: Constraint, chance: random.Random) -> str:
    output: list[int] = []
    while len(output) < 3000:
        mask = np.zeros((1, mask_width(TOKENS.vocab_size)), dtype=np.int32)
        FILLER.fill([MaskWish(constraint, 0)], mask)
        choices = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()
        assert choices, "no way on"
        token = END if END in choices and chance.random() < 0.2 else chance.choice(choices)
        assert constraint.advance([token]) == 1
        if token in (END, 257):
            return b"".join(map(TOKENS.token_bytes, output)).decode()
        output.append(token)
    raise AssertionError("no end")


def read(
    written: ToolFormat, text: str, schemas: dict[str, dict[str, Any]] = SCHEMAS
) -> tuple[list[tuple[str, Any]], str]:
    parser = FormatParser(written, schemas=schemas)
    names, arguments, content = [], [], ""
    for delta in parser.push(text) + parser.finish():
        if isinstance(delta, CallStart):
            names.append(delta.name)
            arguments.append("")
        elif isinstance(delta, CallArguments):
            arguments[delta.index] += delta.text
        elif isinstance(delta, Content):
            content += delta.text
    return list(zip(names, map(json.loads, arguments), strict=True)), content


def right(name: str, arguments: dict[str, Any]) -> bool:
    if name == "add":
        return list(arguments) == ["b"] and [type(item) for item in arguments["b"]] == [bool, bool]
    return arguments["city"] in ("Paris", "Rome") and 1 <= arguments["days"] <= 9 and len(arguments) == 2


@pytest.mark.parametrize("written", WRITTEN, ids=lambda item: item.name)
def test_forced_calls_are_calls_that_the_parser_reads(written: ToolFormat) -> None:
    assert written.writing is not None
    counts = set()
    for parallel in (True, False):
        form = only_calls(written.writing, SCHEMAS, parallel)
        for seed in range(12):
            calls, content = read(written, walk(GRAMMARS.constraint(form), random.Random(seed)))
            assert calls and not content and all(right(*call) for call in calls), calls
            assert parallel or len(calls) == 1
            counts.add(len(calls))
    assert (len(counts) > 1) != written.writing.alone


@pytest.mark.parametrize("written", [item for item in WRITTEN if item.writing.trigger], ids=lambda item: item.name)
def test_calls_within_text_keep_to_strict_schemas(written: ToolFormat) -> None:
    assert written.writing is not None
    form = calls_within_text(written.writing, SCHEMAS, ["get_weather"], True)
    single = only_calls(written.writing, SCHEMAS, False)
    call = next(
        text
        for text in (walk(GRAMMARS.constraint(single), random.Random(seed)) for seed in range(50))
        if "get_weather" in text
    )
    assert takes(form, "No call, [1] {2} <b>.")
    assert takes(form, call) and takes(form, f"Let me see.\n{call}")
    assert not takes(form, call.replace("get_weather", "get_whether"))
    wrong = call.replace("Paris", "Berlin").replace("Rome", "Berlin")
    assert wrong != call and not takes(form, wrong)
    loose = calls_within_text(written.writing, SCHEMAS, ["add"], True)
    assert takes(loose, wrong)


@pytest.mark.parametrize("written", [item for item in WRITTEN if not item.writing.trigger], ids=lambda item: item.name)
def test_calls_that_no_mark_begins_keep_to_strict_schemas(written: ToolFormat) -> None:
    """Whatever the masks let through and the parser calls a call is right; what begins like one is nothing else."""
    assert written.writing is not None
    text = text_without_calls(written.regions)
    form = calls_or_form(written.writing, SCHEMAS, ["get_weather", "add"], True, text, "")
    for seed in range(12):
        calls, content = read(written, walk(GRAMMARS.constraint(form), random.Random(seed)))
        assert all(right(*call) for call in calls) and not (calls and content)
    call = walk(GRAMMARS.constraint(only_calls(written.writing, SCHEMAS, True)), random.Random(3))
    assert takes(form, call) and not takes(form, call.replace("get_weather", "get_whether").replace("add", "ad"))
    for said in ("No call.", "", " \n12 [1] {2}\n<b>", "ä"):
        assert takes(form, said) and read(written, said) == ([], said)
    for region in written.regions:  # wherever else the parser would see a call
        assert not takes(form, f"{region.opener}x") and (region.bare or not takes(form, f"So:\n{region.opener}x"))


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ({"json_object": True}, '{"x": 1}'),
        ({"json": {"type": "array", "maxItems": 0}}, "[]"),
        ({"regex": "[0-9]+"}, "12"),
        ({"choice": ["red", "blue"]}, "blue"),
        ({"grammar": 'root ::= "y"'}, "y"),
    ],
)
def test_calls_or_the_form_that_is_wanted(form: dict[str, Any], text: str) -> None:
    written = next(item for item in TOOL_FORMATS if item.name == "hermes")
    assert written.writing is not None
    wanted = StructuredOutputsParams(**form)
    found = calls_or_form(written.writing, SCHEMAS, ["add"], True, wanted, "")
    call = '<tool_call>\n{"name": "add", "arguments": {"b": [true, false]}}\n</tool_call>'
    assert takes(found, text) and takes(found, call)
    assert not takes(found, call.replace("true", "1"))
    assert takes(wanted, text)
    answered = calls_or_form(written.writing, SCHEMAS, ["add"], True, wanted, "<|channel|>final<|message|>")
    assert takes(answered, f"<|channel|>final<|message|>{text}") and not takes(answered, text + "</think>")


def test_thoughts_come_before_a_form() -> None:
    form = {"json": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}}
    marks = {"opener": "<think>", "closers": ("</think>",)}
    free = StructuredOutputsParams(**form, after=Thoughts(**marks))
    begun = StructuredOutputsParams(**form, after=Thoughts(**marks, begun=True))
    for thought in ("hm", "", '{"b" <think> ä\n', "</thin"):
        assert takes(free, f'<think>{thought}</think>\n\n{{"a": 1}}')
        assert takes(begun, f'{thought}</think>\n\n{{"a": 1}}')
    assert takes(free, '{"a": 1}') and not takes(begun, '{"a": 1}')
    assert not takes(free, '<think>hm</think>{"b": 1}')
    channels = Thoughts(
        opener="<|channel|>analysis<|message|>",
        closers=("<|end|>",),
        then="<|start|>assistant",
        answer="<|channel|>final<|message|>",
    )
    form = StructuredOutputsParams(choice=["yes"], after=channels)
    assert takes(form, "<|channel|>final<|message|>yes") and not takes(form, "yes")
    assert takes(form, "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>yes")


FUNCTION = {"begin": "<function=f>", "schema": {"type": "object", "properties": {}, "additionalProperties": False}}
TAG = {"type": "tag", "begin": "<a>", "content": {"type": "any_text"}, "end": "</a>"}


@pytest.mark.parametrize(
    ("tag", "good", "bad"),
    [
        (
            {"structures": [{**FUNCTION, "end": "</function>"}], "triggers": ["<function="]},
            ["so", "so <function=f>{}</function> and <function=f>{ }</function>"],
            ["<function=g>{}</function>", "<function=f>{}", '<function=f>{"a": 1}</function>'],
        ),
        ({"format": TAG}, ["<a></a>", "<a>b\n</b></a>"], ["<a>", "b", "<a></a>c"]),
        (
            {"format": {"type": "sequence", "elements": [TAG, {"type": "regex", "pattern": "[0-9]+"}]}},
            ["<a>x</a>12"],
            ["<a>x</a>", "<a>x</a>12a"],
        ),
        (
            {"format": {"type": "or", "elements": [TAG, {"type": "const_string", "value": "no"}]}},
            ["no", "<a>no</a>"],
            ["nono", ""],
        ),
        ({"format": {"type": "grammar", "grammar": 'root ::= "x" root | "y"'}}, ["y", "xxy"], ["x"]),
        (
            {"format": {"type": "tags_with_separator", "tags": [TAG], "separator": ", ", "at_least_one": True}},
            ["<a>1</a>", "<a>1</a>, <a>2</a>"],
            ["", "<a>1</a><a>2</a>", "<a>1</a>, "],
        ),
        (
            {"format": {"type": "tags_with_separator", "tags": [TAG], "separator": "", "stop_after_first": True}},
            ["<a>1</a>", ""],
            ["<a>1</a><a>2</a>"],
        ),
        (
            {"format": {"type": "triggered_tags", "triggers": ["<a"], "tags": [TAG], "at_least_one": True}},
            ["so <a>1</a> so", "<a>1</a><a>2</a>"],
            ["so"],
        ),
        ({"format": {**TAG, "end": ["</a>", "</think>"]}}, ["<a>x</a>", "<a>x</think>"], ["<a>x"]),
        (
            {
                "format": {
                    "type": "json_schema",
                    "style": "qwen_xml",
                    "json_schema": {
                        "properties": {"s": {"type": "string"}, "i": {"type": "integer"}},
                        "required": ["i"],
                    },
                }
            },
            [
                "<parameter=i>\n5\n</parameter>\n",
                "<parameter=s>\na <b>\n</parameter>\n<parameter=i>\n5\n</parameter>\n",
            ],
            ["<parameter=i>\nx\n</parameter>\n", "<parameter=s>\na\n</parameter>\n"],
        ),
    ],
)
def test_structural_tags(tag: dict[str, Any], good: Sequence[str], bad: Sequence[str]) -> None:
    for given in ({"type": "structural_tag", **tag}, json.dumps({"type": "structural_tag", **tag})):
        form = StructuredOutputsParams(structural_tag=given)
        assert [text for text in good if not takes(form, text)] == []
        assert [text for text in bad if takes(form, text)] == []


@pytest.mark.parametrize(
    ("tag", "named"),
    [
        ({}, "needs a format"),
        ({"type": "json_schema"}, "of the type"),
        ("{", "not valid JSON"),
        ({"format": {"type": "poem"}}, "'poem'"),
        ({"format": {"type": "or", "elements": []}}, "elements"),
        ({"format": {"type": "tag", "begin": 5}}, "begin"),
        ({"format": {"type": "tag", "begin": "a", "content": {"type": "any_text"}, "end": 5}}, "end is neither"),
        ({"format": {"type": "json_schema", "json_schema": {"not": {}}}}, "not"),
        ({"format": {"type": "json_schema", "json_schema": {}, "style": "yaml"}}, "yaml"),
        ({"format": {"type": "triggered_tags", "triggers": ["x"], "tags": [TAG]}}, "'x'"),
        ({"format": {"type": "sequence", "elements": [{"type": "any_text"}, TAG]}}, "any_text where"),
        ({"structures": [FUNCTION], "triggers": ["<function="]}, "end is neither"),
        ({"format": {"type": "triggered_tags", "triggers": ["<a"], "tags": [TAG, "x"]}}, "wrong type"),
        ({"format": {"type": "triggered_tags", "triggers": [{}], "tags": [TAG]}}, "no tag begins"),
        ({"format": {"type": "tags_with_separator", "separator": "", "tags": ["x"]}}, "wrong type"),
        ({"format": {"type": "tags_with_separator", "separator": "", "tags": [TAG], "max_tags": []}}, "wrong type"),
        ({"format": {"type": ["or"]}}, "wrong type"),
        ({"format": {"type": "json_schema", "json_schema": {}, "style": []}}, "wrong type"),
        (
            {
                "format": {
                    "type": "json_schema",
                    "style": "qwen_xml",
                    "json_schema": {"properties": {"a": 5}, "required": 5},
                }
            },
            "wrong type",
        ),
    ],
)
def test_wrong_tags_are_refused(tag: Any, named: str) -> None:
    with pytest.raises(ValidationError, match=named) as caught:
        GRAMMARS.check(StructuredOutputsParams(structural_tag=tag))
    assert caught.value.field == "structured_outputs"


def test_formats_may_not_be_nested_for_ever() -> None:
    tag: dict[str, Any] = TAG
    for _ in range(20):
        tag = {"type": "or", "elements": [tag]}
    with pytest.raises(ValidationError, match="16 levels"):
        GRAMMARS.check(StructuredOutputsParams(structural_tag={"type": "structural_tag", "format": tag}))


DEEP: dict[str, Any] = {
    "type": "object",
    "properties": {
        "place": {
            "type": "object",
            "properties": {"name": {"enum": ["here", "there", 3, None]}, "far": {"type": ["boolean", "null"]}},
            "required": ["name"],
            "additionalProperties": False,
        },
        "steps": {
            "type": "array",
            "items": {"anyOf": [{"type": "boolean"}, {"const": "x"}]},
            "minItems": 1,
            "maxItems": 3,
        },
        "level": {"$ref": "#/$defs/level"},
    },
    "required": ["steps"],
    "additionalProperties": False,
    "$defs": {"level": {"type": "integer", "minimum": 1, "maximum": 3}},
}


def fits(arguments: dict[str, Any]) -> bool:
    """Whether arguments keep to DEEP."""
    place, steps = arguments.get("place", {"name": "here"}), arguments["steps"]
    return (
        set(arguments) <= set(DEEP["properties"])
        and place["name"] in ("here", "there", 3, None)
        and place.get("far") in (True, False, None)
        and set(place) <= {"name", "far"}
        and 1 <= len(steps) <= 3
        and all(step in (True, False, "x") for step in steps)
        and arguments.get("level", 1) in (1, 2, 3)
    )


@pytest.mark.parametrize("written", WRITTEN, ids=lambda item: item.name)
def test_optional_and_nested_arguments(written: ToolFormat) -> None:
    """Any of the properties may be missing, whatever stands between them; objects and lists hold what they should."""
    assert written.writing is not None
    form, counts = only_calls(written.writing, {"plan": DEEP}, False), set()
    for seed in range(40):
        [(name, arguments)], content = read(
            written, walk(GRAMMARS.constraint(form), random.Random(seed)), {"plan": DEEP}
        )
        assert (name, content) == ("plan", "") and fits(arguments), arguments
        counts.add(frozenset(arguments))
    assert len(counts) > 3


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("kimi_k3", '<|open|>argument key="a" type="number"<|sep|>1<|close|>argument<|sep|>'),
        ("kimi_k3", '<|open|>argument key="a" type="string"<|sep|>1 <b><|close|>argument<|sep|>'),
        ("deepseek_v32", '<｜DSML｜parameter name="a" string="false">[1, {"c": null}]</｜DSML｜parameter>\n'),
        ("minicpm5", '<param name="a"><![CDATA[1 < 2]]></param><param name="b">3</param>'),
        ("lfm2", 'a=1, b="two, (3)", c=[true, {"d": null}]'),
        ("functiongemma", "a:1,b:<escape>two, {3}<escape>,c:[true,{d:null,e:[]}]"),
        ("gemma4", 'a:{},b:<|"|><|"|>'),
    ],
)
def test_arguments_of_tools_without_a_schema(name: str, arguments: str) -> None:
    written = next(item for item in WRITTEN if item.name == name)
    assert written.writing is not None
    form = calls_within_text(written.writing, {"free": {}}, [], False)
    begin = written.writing.begin.replace("NAME", "free").replace("#", "0")
    text = f"{written.writing.before}{begin}{arguments}{written.writing.end}{written.writing.after}"
    assert takes(form, text)
    [(called, given)], content = read(written, text, {})
    assert (called, content) == ("free", "") and set(given) <= set("abc")


def test_what_a_notation_cannot_say_is_refused() -> None:
    spaced = {"plan": {"type": "object", "properties": {"two words": {"type": "string"}}}}
    recursive = {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}}
    recursive["$defs"] = {"node": recursive["properties"]["next"]}
    for name, schema in (("lfm2", spaced), ("gemma4", {"plan": recursive})):
        writing = next(item.writing for item in WRITTEN if item.name == name)
        assert writing is not None
        with pytest.raises(ValidationError, match="the way in which this model writes arguments cannot say that"):
            GRAMMARS.constraint(only_calls(writing, schema, True))
