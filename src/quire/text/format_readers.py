"""Readers: the inside of one tool call region -> the calls in it, or None when it is none.

Pure functions of the text and of the tools' schemas; nothing is ever evaluated. Knows no markers and no stream.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Schemas = Mapping[str, Mapping[str, Any]]  # tool name -> JSON schema of its arguments
MOST_PYTHON = 64 * 1024  # characters of calls in Python's notation
_NAME = re.compile(r"[\w.\-:/]{1,256}")


@dataclass(frozen=True, slots=True)
class Call:
    """One tool call. `arguments` is the text of a JSON object; `id` is None unless the model wrote one."""

    name: str
    arguments: str
    id: str | None = None


Reader = Callable[[str, Schemas], "list[Call] | None"]


def read_json(text: str, schemas: Schemas) -> list[Call] | None:
    """{"name": ..., "arguments": {...}}, or a list of such."""
    return _of_value(_json(text), needs_arguments=False)


def read_bare_json(text: str, schemas: Schemas) -> list[Call] | None:
    """The same without any marker around it: only what has both a name and arguments is a call."""
    return _of_value(_json(text), needs_arguments=True)


def read_mistral(text: str, schemas: Schemas) -> list[Call] | None:
    """A list of calls, or name[ARGS]{...}, or name{...}."""
    found = re.match(r"\s*([\w.\-]+)(?:\[CALL_ID\]([\w\-]+))?(?:\[ARGS\])?\s*(?=\{)", text)
    if found is None:
        return read_json(text, schemas)
    return _named(found[1], text[found.end() :], found[2])


def read_deepseek(text: str, schemas: Schemas) -> list[Call] | None:
    """function<sep>name and a block of JSON, or name<sep>{...}."""
    first, separator, rest = text.partition("<｜tool▁sep｜>")
    if not separator:
        return None
    block = re.fullmatch(r"\s*([^\n]+)\n```(?:json)?\n(.*?)\n?```\s*", rest, re.DOTALL)
    if block is not None:
        return _named(block[1], block[2])
    return _named(first, rest)


def read_kimi(text: str, schemas: Schemas) -> list[Call] | None:
    """functions.name:0 <argument_begin> {...}; what stands before the arguments is the call's id."""
    head, separator, rest = text.partition("<|tool_call_argument_begin|>")
    call_id = head.strip()
    name = re.sub(r":\d+$", "", call_id).removeprefix("functions.")
    return _named(name, rest, call_id) if separator else None


def read_channel(text: str, schemas: Schemas) -> list[Call] | None:
    """name, perhaps a channel and a type, <|message|>, {...}."""
    head, separator, rest = text.partition("<|message|>")
    name = re.match(r"[\w.\-]+", head)
    return _named(name[0], rest) if separator and name else None


def read_function_xml(text: str, schemas: Schemas) -> list[Call] | None:
    """<function=name><parameter=key>value</parameter></function>, one or several."""
    return _each(
        text, r"\s*<function=([^>\s]+)>(.*?)</function>\s*", r"\s*<parameter=([^>]+)>(.*?)</parameter>\s*", schemas
    )


def read_invoke_xml(text: str, schemas: Schemas) -> list[Call] | None:
    """<invoke name="name"><parameter name="key">value</parameter></invoke>, one or several."""
    return _each(
        text,
        r"\s*<invoke name=\"?([^>\"]+)\"?>(.*?)</invoke>\s*",
        r"\s*<parameter name=\"?([^>\"]+)\"?>(.*?)</parameter>\s*",
        schemas,
    )


def read_key_value_xml(text: str, schemas: Schemas) -> list[Call] | None:
    """name, then <arg_key>key</arg_key><arg_value>value</arg_value> for each argument."""
    name, mark, rest = text.partition("<arg_key>")
    pairs = _pairs(mark + rest, r"\s*<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>\s*")
    return None if pairs is None else _typed(name, pairs, schemas)


def read_gemma(text: str, schemas: Schemas) -> list[Call] | None:
    """call:name{key:<escape>text<escape>,other:5}"""
    found = re.fullmatch(r"\s*call:([\w.\-]+)\{(.*)\}\s*", text, re.DOTALL)
    if found is None:
        return None
    scanner = _GemmaValues(found[2])
    arguments = scanner.pairs("")
    return None if arguments is None or scanner.rest else _call_list(found[1], arguments)


def read_pythonic(text: str, schemas: Schemas) -> list[Call] | None:
    """[name(key=literal, ...), ...] in Python's notation; literals only, read from the syntax tree."""
    if len(text) > MOST_PYTHON:
        return None
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        if not isinstance(tree, ast.List) or not tree.elts:
            return None
        calls = [_python_call(node) for node in tree.elts]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return [call for call in calls if call is not None] if None not in calls else None


def read_python_lines(text: str, schemas: Schemas) -> list[Call] | None:
    """name(key=literal), one to a line, as read_pythonic() reads them."""
    return read_pythonic("[" + ",".join(line for line in text.splitlines() if line.strip()) + "]", schemas)


def read_keyed(text: str, schemas: Schemas) -> list[Call] | None:
    """[{name: {...}}, ...]"""
    value = _json(text)
    if not isinstance(value, list) or not all(isinstance(item, dict) and len(item) == 1 for item in value):
        return None
    calls = [_call(name, arguments) for item in value for name, arguments in item.items()]
    return [call for call in calls if call is not None] if calls and None not in calls else None


def read_gemma4(text: str, schemas: Schemas) -> list[Call] | None:
    """The notation of read_gemma() with other marks around texts."""
    return None if "<escape>" in text else read_gemma(text.replace('<|"|>', "<escape>"), schemas)


def read_dsml(text: str, schemas: Schemas) -> list[Call] | None:
    """Elements that say of each value whether it is a text or JSON."""
    calls: list[Call] = []
    parameter = re.compile(
        r'\s*<｜DSML｜parameter name="([^"]+)" string="(true|false)">(.*?)</｜DSML｜parameter>\s*', re.DOTALL
    )
    for name, body in _pairs(text, r'\s*<｜DSML｜invoke name="([^"]+)">(.*?)</｜DSML｜invoke>\s*') or []:
        arguments: dict[str, Any] = {}
        place = 0
        while body[place:].strip():
            found = parameter.match(body, place)
            if found is None:
                return None
            arguments[found[1]] = found[3] if found[2] == "true" else _json_or_text(found[3])
            place = found.end()
        call = _call(name, arguments)
        if call is None:
            return None
        calls.append(call)
    return calls or None


def _python_call(node: ast.expr) -> Call | None:
    if not isinstance(node, ast.Call) or node.args or any(key.arg is None for key in node.keywords):
        return None
    return _call(ast.unparse(node.func), {str(key.arg): _literal(key.value) for key in node.keywords})


def _literal(node: ast.expr) -> Any:
    """The value of a literal; anything else raises ValueError."""
    if isinstance(node, ast.Constant) and (node.value is None or isinstance(node.value, (str, int, float, bool))):
        return node.value
    if isinstance(node, ast.Name) and node.id in ("true", "false", "null"):
        return {"true": True, "false": False, "null": None}[node.id]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _literal(node.operand)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return -value
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_literal(item) for item in node.elts]
    if isinstance(node, ast.Dict):
        keys = [_literal(key) if key is not None else None for key in node.keys]
        if all(isinstance(key, str) for key in keys):
            return dict(zip(keys, map(_literal, node.values), strict=True))
    raise ValueError("not a literal")


class _GemmaValues:
    """Values in functiongemma's notation, read from the left."""

    def __init__(self, text: str) -> None:
        self.rest = text
        self._depth = 0

    def pairs(self, end: str) -> dict[str, Any] | None:
        """key:value,key:value up to `end`; None when it is something else."""
        found: dict[str, Any] = {}
        while self.rest and not (end and self.rest.startswith(end)):
            key = re.match(r"\s*(?:<escape>)?([\w.\- ]+?)(?:<escape>)?\s*:", self.rest)
            if key is None:
                return None
            self.rest = self.rest[key.end() :]
            value = self.value()
            if value is None:
                return None
            found[key[1]] = value[0]
            if self.rest.startswith(","):
                self.rest = self.rest[1:]
            elif self.rest and not (end and self.rest.startswith(end)):
                return None
        return found

    def value(self) -> list[Any] | None:
        """The next value, in a list of one; None when there is none."""
        self._depth += 1
        if self._depth > 64:
            return None
        try:
            return self._value()
        finally:
            self._depth -= 1

    def _value(self) -> list[Any] | None:
        if self.rest.startswith("<escape>"):
            text, end, self.rest = self.rest[8:].partition("<escape>")
            return [text] if end else None
        if self.rest.startswith("{"):
            self.rest = self.rest[1:]
            inside = self.pairs("}")
            return [inside] if inside is not None and self._skip("}") else None
        if self.rest.startswith("["):
            self.rest = self.rest[1:]
            items: list[Any] = []
            while not self.rest.startswith("]"):
                item = self.value()
                if item is None or not (self._skip(",") or self.rest.startswith("]")):
                    return None
                items += item
            return [items] if self._skip("]") else None
        bare = re.match(r"[^,{}\[\]<]+", self.rest)
        if bare is None:
            return None
        self.rest = self.rest[bare.end() :]
        return [_json_or_text(bare[0].strip())]

    def _skip(self, mark: str) -> bool:
        found = self.rest.startswith(mark)
        if found:
            self.rest = self.rest[len(mark) :]
        return found


def _each(text: str, outer: str, inner: str, schemas: Schemas) -> list[Call] | None:
    """Calls that are elements with arguments as elements, and nothing between them."""
    calls: list[Call] = []
    named = _pairs(text, outer)
    for name, body in named or []:
        pairs = _pairs(body, inner)
        found = None if pairs is None else _typed(name, pairs, schemas)
        if found is None:
            return None
        calls += found
    return calls or None


def _pairs(text: str, pattern: str) -> list[tuple[str, str]] | None:
    """The two groups of a pattern that must match again and again until the text's end."""
    found: list[tuple[str, str]] = []
    place = 0
    expression = re.compile(pattern, re.DOTALL)
    while text[place:].strip():
        match = expression.match(text, place)
        if match is None:
            return None
        found.append((match[1], match[2]))
        place = match.end()
    return found


def _typed(name: str, pairs: list[tuple[str, str]], schemas: Schemas) -> list[Call] | None:
    """A call whose arguments came as text: strings stay as they are, all else is read as JSON where it can be."""
    name = name.strip()
    properties = schemas.get(name, {}).get("properties")
    arguments: dict[str, Any] = {}
    for key, written in pairs:
        value = written.removeprefix("\n").removesuffix("\n")
        described = properties.get(key.strip()) if isinstance(properties, Mapping) else None
        kind = described.get("type") if isinstance(described, Mapping) else None
        arguments[key.strip()] = value if kind == "string" else _json_or_text(value)
    return _call_list(name, arguments)


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text.strip(), parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return {"True": True, "False": False, "None": None}.get(text.strip(), text)


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


def _call_list(name: str, arguments: dict[str, Any]) -> list[Call] | None:
    call = _call(name, arguments)
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


READERS: dict[str, Reader] = {
    "json": read_json,
    "bare_json": read_bare_json,
    "mistral": read_mistral,
    "deepseek": read_deepseek,
    "kimi": read_kimi,
    "channel": read_channel,
    "function_xml": read_function_xml,
    "invoke_xml": read_invoke_xml,
    "key_value_xml": read_key_value_xml,
    "gemma": read_gemma,
    "gemma4": read_gemma4,
    "pythonic": read_pythonic,
    "python_lines": read_python_lines,
    "keyed": read_keyed,
    "dsml": read_dsml,
}
