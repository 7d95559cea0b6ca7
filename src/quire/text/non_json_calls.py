"""Calls whose arguments are not written as JSON, read while they come: each argument is told when it is complete, and
texts within elements as they are written.

What comes out is the text of a JSON object, piece by piece. Two kinds of writing, as plain data: elements, and calls in
the notation of a programming language. Works character by character, so pieces of text make no difference; nothing is
ever evaluated. Knows no regions and no markers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from quire.text.literals import gemma4_pair, gemma_pair, json_or_text, python_pair

Schemas = Mapping[str, Mapping[str, Any]]  # tool name -> JSON schema of its arguments
_NAME = re.compile(r"[\w.\-:/]{1,256}")
_XTML_ARGUMENT = r'\s*<\|open\|>argument key="(?P<key>[^"]*)" type="(?P<text>\w+)"<\|sep\|>'
_GEMMA_CALL = re.compile(r"\s*call:([\w.\-]+)")
_TEXT_FLAGS = ("true", "string")  # by which an element says that its value is text
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
    text; or all arguments as one object. `opens` matches what stands before a value that can be told while it comes.
    `closes` ends a call; without it a call ends with its region.
    """

    argument: re.Pattern[str]
    ends: tuple[str, ...]
    call: re.Pattern[str] | None = None
    opens: re.Pattern[str] | None = None
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
class NonJsonCalls:
    """The calls of one region. `broken`: what follows is no call; `inside`: a call has begun and not ended.

    `untold` is the text that nothing was told of.
    """

    writing: Elements | Notation
    schemas: Schemas
    closer: str = ""  # of the region
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
    _ends: tuple[str, ...] = ()  # what may end the text that is being told
    _held: str = ""  # of it, the beginning of an end, perhaps
    _skips: bool = False  # a new line as its first character

    def step(self, character: str) -> list[Told]:
        """One more character; what became certain with it."""
        if self._ends:
            self._text(character)
            return self._taken()
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

    def close(self) -> list[Told]:
        """The region has ended: so has a call that is ended by nothing else, and one whose end is missing."""
        if not self.broken and not self._ends and isinstance(self.writing, Elements):
            rest = "".join(self._waiting).removesuffix(self.closer).strip()
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
        elif writing.opens is not None and self._tail.endswith(">") and len(self._waiting) < LONGEST_HEAD:
            self._begin_text(writing, writing.opens)

    def _begin_text(self, writing: Elements, opens: re.Pattern[str]) -> None:
        """Begin to tell an argument that is text, if one begins here."""
        found = opens.fullmatch("".join(self._waiting))
        if found is None:
            return
        groups = found.groupdict()
        key, flag = groups["key"].strip(), groups.get("text")
        if (self._kind(key) == "string") if flag is None else flag in _TEXT_FLAGS:
            self._tell_name()
            self._out.append(Told("arguments", f"{', ' if self._count else '{'}{_json(key)}: " + '"'))
            self._count += 1
            self._before, self._waiting = "", []
            ends = (*writing.ends, self.closer)
            # A line's end behind the opening element and before the closing one belongs to them.
            self._ends = ends if flag is not None else (*ends, *("\n" + end for end in ends))
            self._skips = flag is None

    def _text(self, character: str) -> None:
        """One more character of a text; where it ends, and what of it cannot be its end."""
        skipped, self._skips = self._skips and character == "\n", False
        self._held += "" if skipped else character
        while self._held and not any(end.startswith(self._held) for end in self._ends):
            self._out.append(Told("arguments", _json(self._held[0])[1:-1]))
            self._held = self._held[1:]
        if self._held in self._ends and not self._held.endswith(self.closer):
            self._out.append(Told("arguments", '"'))
            self._ends, self._held, self._tail = (), "", ""

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
            return written if is_text in _TEXT_FLAGS else json_or_text(written)
        if written.startswith("<![CDATA[") and written.endswith("]]>"):
            return written[9:-3]
        value = written.removeprefix("\n").removesuffix("\n")
        return value if self._kind(key) == "string" else json_or_text(value)

    def _kind(self, key: str) -> Any:
        """The type of an argument, by the tool's schema."""
        properties = self.schemas.get(self._name, {}).get("properties")
        described = properties.get(key) if isinstance(properties, Mapping) else None
        return described.get("type") if isinstance(described, Mapping) else None

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


def _json(value: Any) -> str:
    """The value as JSON. What JSON cannot say, such as a number beyond float64, is said as a text."""
    try:
        written = json.dumps(value, ensure_ascii=False, allow_nan=False)
        written.encode()
    except (ValueError, RecursionError):
        return json.dumps(str(value))
    return written


def _elements(opens: str, end: str, call: str, closes: str) -> Elements:
    """Elements whose arguments are `opens`, the value, `end`."""
    argument = re.compile(rf"{opens}(?P<value>.*?){re.escape(end)}", re.DOTALL)
    return Elements(argument, (end,), re.compile(call), re.compile(opens, re.DOTALL), closes)


def _pairs(suffix: str) -> Elements:
    """A bare name, then elements for keys and values, all of whose names end with `suffix`."""
    opens = rf"\s*<arg_key{suffix}>(?P<key>.*?)</arg_key{suffix}>\s*<arg_value{suffix}>"
    found = _elements(opens, f"</arg_value{suffix}>", "", "")
    return replace(found, call=None, bare_end=f"<arg_key{suffix}>", separator=f"<tool_sep{suffix}>")


NON_JSON: dict[str, Elements | Notation] = {
    "function_xml": _elements(
        r"\s*<parameter=(?P<key>[^>]+)>", "</parameter>", r"\s*<function=([^>\s]+)>", "</function>"
    ),
    "invoke_xml": _elements(
        r'\s*<parameter name="?(?P<key>[^>"]+)"?>', "</parameter>", r'\s*<invoke name="?([^>"]+)"?>', "</invoke>"
    ),
    "dsml": _elements(
        r'\s*<｜DSML｜parameter name="(?P<key>[^"]+)" string="(?P<text>true|false)">',
        "</｜DSML｜parameter>",
        r'\s*<｜DSML｜invoke name="([^"]+)">',
        "</｜DSML｜invoke>",
    ),
    "steptml": _elements(
        r'\s*<steptml:parameter name="(?P<key>[^">]+)">',
        "</steptml:parameter>",
        r'[^<]*(?:<｜tool_sep｜>)?\s*<steptml:invoke name="([^">]+)">',
        "</steptml:invoke>",
    ),
    "key_value_xml": _pairs(""),
    "key_value_opensource": _pairs(":opensource"),
    "param_xml": Elements(
        re.compile(r'\s*<param name="(?P<key>[^">]+)">(?P<value><!\[CDATA\[.*?\]\]>|.*?)</param>', re.DOTALL),
        ("</param>",),
        re.compile(r'\s*"([^">]+)">'),
    ),
    "xtml": Elements(
        re.compile(
            rf"{_XTML_ARGUMENT}(?P<value>.*?)<\|close\|>argument<\|sep\|>"
            r"|\s*<\|open\|>json[^<>]*<\|sep\|>(?P<whole>.*?)<\|close\|>json<\|sep\|>",
            re.DOTALL,
        ),
        ("<|close|>argument<|sep|>", "<|close|>json<|sep|>"),
        re.compile(r'\s*"([^"]+)"[^<>]*<\|sep\|>'),
        re.compile(_XTML_ARGUMENT),
    ),
    "pythonic": Notation(
        re.compile(r"\s*\[\s*([\w.\-]+)\s*"), re.compile(r"\s*,\s*([\w.\-]+)\s*"), "()", ("'", '"'), True, python_pair
    ),
    "python_lines": Notation(
        re.compile(r"\s*([\w.\-]+)\s*"), re.compile(r"[\s,]*([\w.\-]+)\s*"), "()", ("'", '"'), True, python_pair
    ),
    "gemma": Notation(_GEMMA_CALL, _GEMMA_CALL, "{}", ("<escape>",), False, gemma_pair),
    "gemma4": Notation(_GEMMA_CALL, _GEMMA_CALL, "{}", ('<|"|>',), False, gemma4_pair),
}
