"""Readers: the inside of one tool call region, written as JSON -> the calls in it, or None when it is none.

Pure functions of the text, for calls that could not be told while they came. Knows no markers and no stream.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_NAME = re.compile(r"[\w.\-:/]{1,256}")


@dataclass(frozen=True, slots=True)
class Call:
    """One tool call. `arguments` is the text of a JSON object; `id` is None unless the model wrote one."""

    name: str
    arguments: str
    id: str | None = None


Reader = Callable[[str], "list[Call] | None"]


def read_json(text: str) -> list[Call] | None:
    """{"name": ..., "arguments": {...}}, or a list of such."""
    return _of_value(_json(text), needs_arguments=False)


def read_bare_json(text: str) -> list[Call] | None:
    """The same without any marker around it: only what has both a name and arguments is a call."""
    return _of_value(_json(text), needs_arguments=True)


def read_mistral(text: str) -> list[Call] | None:
    """A list of calls, or name[ARGS]{...}, or name{...}."""
    found = re.match(r"\s*([\w.\-]+)(?:\[CALL_ID\]([\w\-]+))?(?:\[ARGS\])?\s*(?=\{)", text)
    if found is None:
        return read_json(text)
    return _named(found[1], text[found.end() :], found[2])


def read_deepseek(text: str) -> list[Call] | None:
    """function<sep>name and a block of JSON, or name<sep>{...}."""
    first, separator, rest = text.partition("<｜tool▁sep｜>")
    if not separator:
        return None
    block = re.fullmatch(r"\s*([^\n]+)\n```(?:json)?\n(.*?)\n?```\s*", rest, re.DOTALL)
    if block is not None:
        return _named(block[1], block[2])
    return _named(first, rest)


def read_kimi(text: str) -> list[Call] | None:
    """functions.name:0 <argument_begin> {...}; what stands before the arguments is the call's id."""
    head, separator, rest = text.partition("<|tool_call_argument_begin|>")
    call_id = head.strip()
    name = re.sub(r":\d+$", "", call_id).removeprefix("functions.")
    return _named(name, rest, call_id) if separator else None


def read_channel(text: str) -> list[Call] | None:
    """name, perhaps a channel and a type, <|message|>, {...}."""
    head, separator, rest = text.partition("<|message|>")
    name = re.match(r"[\w.\-]+", head)
    return _named(name[0], rest) if separator and name else None


def read_keyed(text: str) -> list[Call] | None:
    """[{name: {...}}, ...]"""
    value = _json(text)
    if not isinstance(value, list) or not all(isinstance(item, dict) and len(item) == 1 for item in value):
        return None
    calls = [_call(name, arguments) for item in value for name, arguments in item.items()]
    return [call for call in calls if call is not None] if calls and None not in calls else None


def _json(text: str) -> Any:
    try:
        return json.loads(text.strip(), strict=False, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return None


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def calls_of_value(value: Any) -> list[Call] | None:
    """Calls from an object of any of the shapes that JSON formats have, or from a list of them."""
    return _of_value(value, needs_arguments=False)


def _of_value(value: Any, needs_arguments: bool) -> list[Call] | None:
    """Calls from a parsed object or a list of them."""
    items = value if isinstance(value, list) else [value]
    calls: list[Call] = []
    for item in items:
        if not isinstance(item, dict):
            return None
        inner = item.get("function")
        described = inner if isinstance(inner, dict) else item
        name = described.get("name", inner if isinstance(inner, str) else described.get("tool_name"))
        arguments = next((described[key] for key in ("arguments", "parameters") if key in described), None)
        if arguments is None:
            if needs_arguments:
                return None
            arguments = {}
        if isinstance(arguments, str):
            arguments = _json(arguments)
        call_id = item.get("tool_call_id", item.get("id"))
        call = _call(name, arguments, call_id if isinstance(call_id, str) and call_id else None)
        if call is None:
            return None
        calls.append(call)
    return calls or None


def _named(name: str, text: str, call_id: str | None = None) -> list[Call] | None:
    call = _call(name.strip(), _json(text) if text.strip() else {}, call_id)
    return None if call is None else [call]


def _call(name: Any, arguments: Any, call_id: str | None = None) -> Call | None:
    """A call if it has a usable name and an object of arguments."""
    if not isinstance(name, str) or not _NAME.fullmatch(name) or not isinstance(arguments, dict):
        return None
    try:
        written = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        written.encode()
    except (ValueError, RecursionError):  # a number beyond float64, or half of a surrogate pair
        return None
    return Call(name, written, call_id)


def read_plamo(text: str) -> list[Call] | None:
    """<begin_tool_name>name<end_tool_name><begin_tool_arguments>, perhaps the kind of arguments, {...}"""
    found = re.match(r"\s*<\|plamo:begin_tool_name:plamo\|>\s*([\w.\-]+)\s*<\|plamo:end_tool_name:plamo\|>", text)
    return None if found is None else _named(found[1], text[text.find("{", found.end()) :])


READERS: dict[str, Reader] = {
    "json": read_json,
    "bare_json": read_bare_json,
    "mistral": read_mistral,
    "deepseek": read_deepseek,
    "kimi": read_kimi,
    "channel": read_channel,
    "keyed": read_keyed,
    "plamo": read_plamo,
}
