"""Calls whose arguments are not written as JSON, read while they come: each argument is told when it is complete.

What comes out is the text of a JSON object, piece by piece. Two kinds of writing, as plain data: elements, and calls in
the notation of a programming language. Works character by character, so pieces of text make no difference; nothing is
ever evaluated. Knows no regions and no markers.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Schemas = Mapping[str, Mapping[str, Any]]  # tool name -> JSON schema of its arguments
MOST_PYTHON = 64 * 1024  # characters of one argument in Python's notation
_NAME = re.compile(r"[\w.\-:/]{1,256}")
_GEMMA_CALL = re.compile(r"\s*call:([\w.\-]+)")
LONGEST_HEAD = 2048  # characters before the arguments


@dataclass(frozen=True, slots=True)
class Told:
    """What became certain: a call begins, more of its arguments, or it is complete."""

    kind: Literal["name", "arguments", "end"]
    text: str = ""


@dataclass(frozen=True, slots=True)
class Elements:
    """Calls as elements with an element for each argument.

    `call` matches what begins a call, its name as a group; a call without it begins with its bare name. An argument ends
    with one of `ends` and is matched by `argument`: its key, its value and, where the writing says so, whether that is
    text; or all arguments as one object.
    `closes` ends a call; without it a call ends with its region.
    """

    argument: re.Pattern[str]
    ends: tuple[str, ...]
    call: re.Pattern[str] | None = None
    closes: str = ""
    bare_end: str = ""  # what stands behind a bare name
    separator: str = ""  # what may stand behind it before that


@dataclass(frozen=True, slots=True)
class Notation:
    """Calls as name(key=value, ...) or the like: `first` and `later` match what stands before the bracket of one.

    `quotes` begin and end texts, in which a backslash escapes where `escapes` is set. `read` makes keys and values of the
    text between two commas, or None.
    """

    first: re.Pattern[str]
    later: re.Pattern[str]
    bracket: str
    quotes: tuple[str, ...]
    escapes: bool
    read: Callable[[str], dict[str, Any] | None]


@dataclass(slots=True)
class SpelledCalls:
    """The calls of one region. `broken`: what follows is no call; `inside`: a call has begun and not ended.

    `untold` is the text that nothing was told of.
    """

    writing: Elements | Notation
    schemas: Schemas
    broken: bool = False
    inside: bool = False
    _waiting: list[str] = field(default_factory=list)
    _before: str = ""  # what stands before it: the beginning of a call that is not told
    _out: list[Told] = field(default_factory=list)
    _name: str = ""
    _count: int = 0  # arguments of this call
    _told: bool = False  # whether this call is
    _calls: int = 0
    _tail: str = ""
    _quote: str = ""
    _escaped: bool = False
    _open: str = ""  # brackets that are to be closed within an argument

    def step(self, character: str) -> list[Told]:
        """One more character; what became certain with it."""
        self._waiting.append(character)
        if not self.broken:
            self._tail = (self._tail + character)[-32:]
            if isinstance(self.writing, Elements):
                self._element(self.writing)
            else:
                self._notation(self.writing, character)
        return self._taken()

    @property
    def untold(self) -> str:
        """The text behind what was told last."""
        return self._before + "".join(self._waiting)

    @property
    def cut_off(self) -> bool:
        """Whether a call has been told that is not complete, and nothing that is none has come behind it."""
        return self.inside and self._told and not self.broken

    def close(self, closer: str) -> list[Told]:
        """The region ended with `closer`: so does a call that is ended by nothing else, and one whose end is missing."""
        if not self.broken and isinstance(self.writing, Elements):
            rest = "".join(self._waiting).removesuffix(closer).strip()
            if not self.inside:
                rest = rest.removesuffix(self.writing.separator).strip()
            if not self.inside and self.writing.call is None and _NAME.fullmatch(rest):
                self._begin(rest)  # a call without arguments
                rest = ""
            if self.inside and not rest:
                self._end()
        return self._taken()

    def _taken(self) -> list[Told]:
        out, self._out = self._out, []
        return out

    # ---------------------------------------------------------------- elements

    def _element(self, writing: Elements) -> None:
        if not self.inside:
            if writing.call is None:
                if self._tail.endswith(writing.bare_end):
                    name = "".join(self._waiting)[: -len(writing.bare_end)].strip()
                    self._begin(name.removesuffix(writing.separator), writing.bare_end)
            elif len(self._waiting) > LONGEST_HEAD:
                self.broken = True
            elif self._tail.endswith(">"):
                found = writing.call.fullmatch("".join(self._waiting))
                if found is not None:
                    self._begin(found[1])
        elif self._tail.endswith(writing.ends):
            found = writing.argument.fullmatch("".join(self._waiting))
            if found is None:
                self.broken = True
                return
            self._arguments(found.groupdict())
        elif writing.closes and self._tail.endswith(writing.closes) and len(self._waiting) < LONGEST_HEAD:
            self._end_element(writing.closes)

    def _arguments(self, groups: Mapping[str, str | None]) -> None:
        """An argument, or all of them."""
        whole = groups.get("whole")
        if whole is None:
            key = (groups["key"] or "").strip()
            self._argument(key, self._value(key, groups["value"] or "", groups.get("text")))
            return
        pairs = json_or_text(whole)
        self.broken = not isinstance(pairs, dict)
        for key, value in pairs.items() if isinstance(pairs, dict) else ():
            self._argument(key, value)

    def _end_element(self, mark: str) -> None:
        """The end of a call, unless it stands within an argument."""
        if "".join(self._waiting).strip() == mark:
            self._end()

    def _value(self, key: str, written: str, is_text: str | None = None) -> Any:
        """A value that came as text: texts stay as they are, all else is read as JSON where it can be."""
        if is_text is not None:
            return written if is_text in ("true", "string") else json_or_text(written)
        if written.startswith("<![CDATA[") and written.endswith("]]>"):
            return written[9:-3]
        value = written.removeprefix("\n").removesuffix("\n")
        properties = self.schemas.get(self._name, {}).get("properties")
        described = properties.get(key) if isinstance(properties, Mapping) else None
        kind = described.get("type") if isinstance(described, Mapping) else None
        return value if kind == "string" else json_or_text(value)

    # ---------------------------------------------------------------- notations

    def _notation(self, writing: Notation, character: str) -> None:
        if not self.inside:
            if character == writing.bracket[0]:
                found = (writing.later if self._calls else writing.first).fullmatch("".join(self._waiting[:-1]))
                if found is None:
                    self.broken = True
                else:
                    self._begin(found[1])
            return
        if self._in_quotes(writing, character):
            return
        if not self._open and character in ("," + writing.bracket[1]):
            self._piece(writing, "".join(self._waiting[:-1]), last=character != ",")
        elif character in "([{":
            self._open += {"(": ")", "[": "]", "{": "}"}[character]
        elif character in ")]}":
            if not self._open.endswith(character):
                self.broken = True
            self._open = self._open[:-1]

    def _in_quotes(self, writing: Notation, character: str) -> bool:
        """Keep count of quotes; whether the character belongs to a text."""
        if self._quote:
            if self._escaped:
                self._escaped = False
            elif writing.escapes and character == "\\":
                self._escaped = True
            elif self._tail.endswith(self._quote):
                self._quote, self._tail = "", ""
            return True
        self._quote = next((quote for quote in writing.quotes if self._tail.endswith(quote)), "")
        if self._quote:
            self._tail = ""
        return bool(self._quote)

    def _piece(self, writing: Notation, text: str, last: bool) -> None:
        """What stood before a comma, or before the end of the call."""
        if text.strip() or not last:
            pairs = writing.read(text)
            if not pairs:
                self.broken = True
                return
            for key, value in pairs.items():
                self._argument(key, value)
        if last:
            self._end()

    # ---------------------------------------------------------------- what is told

    def _begin(self, name: str, kept: str = "") -> None:
        """A call; `kept` are the last characters, which belong to its first argument."""
        self._name, self.inside, self._count, self._told = name.strip(), True, 0, False
        self.broken = not _NAME.fullmatch(self._name)
        self._before = "".join(self._waiting)[: len(self._waiting) - len(kept)]
        self._waiting = list(kept)

    def _tell_name(self) -> None:
        if not self._told:
            self._out.append(Told("name", self._name))
            self._told = True

    def _argument(self, key: str, value: Any) -> None:
        self._tell_name()
        self._out.append(Told("arguments", f"{', ' if self._count else '{'}{_json(key)}: {_json(value)}"))
        self._count += 1
        self._before, self._waiting = "", []

    def _end(self) -> None:
        self._tell_name()
        self._out += [Told("arguments", "}" if self._count else "{}"), Told("end")]
        self.inside, self._open = False, ""
        self._calls += 1
        self._before, self._waiting = "", []


def json_or_text(text: str) -> Any:
    """The value that a text has as JSON, or as a constant of Python's; else the text."""
    try:
        return json.loads(text.strip(), parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return {"True": True, "False": False, "None": None}.get(text.strip(), text)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _json(value: Any) -> str:
    """The value as JSON. What JSON cannot say, such as a number beyond float64, is said as a text."""
    try:
        written = json.dumps(value, ensure_ascii=False, allow_nan=False)
        written.encode()
    except (ValueError, RecursionError):
        return json.dumps(str(value))
    return written


def _python_pair(text: str) -> dict[str, Any] | None:
    """key=literal, read from the syntax tree."""
    found = re.fullmatch(r"\s*([^\W\d]\w*)\s*=(?!=)(.*)", text, re.DOTALL)
    if found is None or len(text) > MOST_PYTHON:
        return None
    try:
        return {found[1]: _literal(ast.parse(found[2].strip(), mode="eval").body)}
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


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


def _gemma_pair(text: str) -> dict[str, Any] | None:
    """key:value, texts between <escape> and <escape>."""
    scanner = _GemmaValues(text.strip())
    found = scanner.pairs("")
    return None if scanner.rest else found


def _gemma4_pair(text: str) -> dict[str, Any] | None:
    """The same with other marks around texts."""
    return None if "<escape>" in text else _gemma_pair(text.replace('<|"|>', "<escape>"))


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
        return [json_or_text(bare[0].strip())]

    def _skip(self, mark: str) -> bool:
        found = self.rest.startswith(mark)
        if found:
            self.rest = self.rest[len(mark) :]
        return found


SPELLED: dict[str, Elements | Notation] = {
    "function_xml": Elements(
        re.compile(r"\s*<parameter=(?P<key>[^>]+)>(?P<value>.*?)</parameter>", re.DOTALL),
        ("</parameter>",),
        re.compile(r"\s*<function=([^>\s]+)>"),
        "</function>",
    ),
    "invoke_xml": Elements(
        re.compile(r'\s*<parameter name="?(?P<key>[^>"]+)"?>(?P<value>.*?)</parameter>', re.DOTALL),
        ("</parameter>",),
        re.compile(r'\s*<invoke name="?([^>"]+)"?>'),
        "</invoke>",
    ),
    "dsml": Elements(
        re.compile(
            r'\s*<｜DSML｜parameter name="(?P<key>[^"]+)" string="(?P<text>true|false)">(?P<value>.*?)</｜DSML｜parameter>',
            re.DOTALL,
        ),
        ("</｜DSML｜parameter>",),
        re.compile(r'\s*<｜DSML｜invoke name="([^"]+)">'),
        "</｜DSML｜invoke>",
    ),
    "steptml": Elements(
        re.compile(r'\s*<steptml:parameter name="(?P<key>[^">]+)">(?P<value>.*?)</steptml:parameter>', re.DOTALL),
        ("</steptml:parameter>",),
        re.compile(r'[^<]*(?:<｜tool_sep｜>)?\s*<steptml:invoke name="([^">]+)">'),
        "</steptml:invoke>",
    ),
    "param_xml": Elements(
        re.compile(r'\s*<param name="(?P<key>[^">]+)">(?P<value><!\[CDATA\[.*?\]\]>|.*?)</param>', re.DOTALL),
        ("</param>",),
        re.compile(r'\s*"([^">]+)">'),
    ),
    "xtml": Elements(
        re.compile(
            r'\s*(?:<\|open\|>argument key="(?P<key>[^"]*)" type="(?P<text>\w+)"<\|sep\|>(?P<value>.*?)'
            r"<\|close\|>argument<\|sep\|>|<\|open\|>json[^<>]*<\|sep\|>(?P<whole>.*?)<\|close\|>json<\|sep\|>)",
            re.DOTALL,
        ),
        ("<|close|>argument<|sep|>", "<|close|>json<|sep|>"),
        re.compile(r'\s*"([^"]+)"[^<>]*<\|sep\|>'),
    ),
    "key_value_xml": Elements(
        re.compile(r"\s*<arg_key>(?P<key>.*?)</arg_key>\s*<arg_value>(?P<value>.*?)</arg_value>", re.DOTALL),
        ("</arg_value>",),
        bare_end="<arg_key>",
        separator="<tool_sep>",
    ),
    "key_value_opensource": Elements(
        re.compile(
            r"\s*<arg_key:opensource>(?P<key>.*?)</arg_key:opensource>"
            r"\s*<arg_value:opensource>(?P<value>.*?)</arg_value:opensource>",
            re.DOTALL,
        ),
        ("</arg_value:opensource>",),
        bare_end="<arg_key:opensource>",
        separator="<tool_sep:opensource>",
    ),
    "pythonic": Notation(
        re.compile(r"\s*\[\s*([\w.\-]+)\s*"), re.compile(r"\s*,\s*([\w.\-]+)\s*"), "()", ("'", '"'), True, _python_pair
    ),
    "python_lines": Notation(
        re.compile(r"\s*([\w.\-]+)\s*"), re.compile(r"[\s,]*([\w.\-]+)\s*"), "()", ("'", '"'), True, _python_pair
    ),
    "gemma": Notation(_GEMMA_CALL, _GEMMA_CALL, "{}", ("<escape>",), False, _gemma_pair),
    "gemma4": Notation(_GEMMA_CALL, _GEMMA_CALL, "{}", ('<|"|>',), False, _gemma4_pair),
}
