"""Arguments that are not written as JSON: an element for each property, or name(key=value, ...) and the like, as grammars.

The styles are plain data; text/non_json_calls.py reads what they let through. Raises ValidationError for what a style
cannot say.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from quire.core.structured import FIELD
from quire.errors import ValidationError
from quire.grammar.lark import Lark, Parts

KEY = r"/[A-Za-z_][A-Za-z0-9_]*/"
MOST_NESTED = 16  # levels of values


@dataclass(frozen=True, slots=True)
class Elements:
    """What stands before and behind a value, by its KEY. Texts are not put into quotes.

    Where the element tells the KIND of its value, `kinds` has it by the schema's type; "" is that of all other types.
    """

    before: str
    behind: str
    kinds: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Notation:
    """Pairs of a key, `equals` and a value, apart by `comma`. `quote`: what texts stand between at any depth, where values
    are not JSON."""

    equals: str
    comma: str
    quote: str = ""


STYLES: dict[str, Elements | Notation] = {
    "qwen_xml": Elements("<parameter=KEY>\n", "\n</parameter>\n"),
    "minimax_xml": Elements('<parameter name="KEY">', "</parameter>\n"),
    "glm_xml": Elements("<arg_key>KEY</arg_key>\n<arg_value>", "</arg_value>\n"),
    "param_xml": Elements('<param name="KEY">', "</param>"),
    "steptml": Elements('<steptml:parameter name="KEY">', "</steptml:parameter>\n"),
    "dsml": Elements(
        '<｜DSML｜parameter name="KEY" string="KIND">', "</｜DSML｜parameter>\n", {"string": "true", "": "false"}
    ),
    "xtml": Elements(
        '<|open|>argument key="KEY" type="KIND"<|sep|>',
        "<|close|>argument<|sep|>",
        {name: name for name in ("string", "number", "boolean", "array", "null")} | {"integer": "number", "": "object"},
    ),
    "python": Notation("=", ", "),
    "gemma": Notation(":", ",", "<escape>"),
    "gemma4": Notation(":", ",", '<|"|>'),
}


def non_json(schema: Any, style: str, lark: Lark, parts: Parts) -> str:
    """The expression for the properties of an object, in the order of its schema."""
    chosen = STYLES[style]
    if isinstance(chosen, Elements):
        return _ElementWriter(chosen, lark, parts, schema).properties()
    return _NotationWriter(chosen, lark, parts, schema).pairs(schema, 0)


def _properties(schema: Any) -> Mapping[str, Any] | None:
    """Those that a schema lists; None where anything may come."""
    found = schema.get("properties") if isinstance(schema, dict) else None
    if isinstance(found, dict):
        return found
    return {} if isinstance(schema, dict) and schema.get("additionalProperties") is False else None


def _texts(kind: Any) -> list[str] | None:
    """The texts of which a value is one, if its schema says so."""
    choices = kind.get("enum") if isinstance(kind, dict) else None
    return choices if isinstance(choices, list) and choices and all(isinstance(one, str) for one in choices) else None


class _Writer:
    """What both kinds of styles need: the grammar in the making, and JSON values that may refer to the whole schema."""

    def __init__(self, lark: Lark, parts: Parts, schema: Any) -> None:
        self._lark = lark
        self._parts = parts
        names = ("$defs", "definitions")
        self._known = {name: schema[name] for name in names if name in schema} if isinstance(schema, dict) else {}

    def _json(self, kind: Any) -> str:
        kind = {**self._known, **kind} if isinstance(kind, dict) else kind
        return self._lark.other(self._parts.schema(kind, "template_json"))


class _ElementWriter(_Writer):
    """An element for each property."""

    def __init__(self, style: Elements, lark: Lark, parts: Parts, schema: Any) -> None:
        super().__init__(lark, parts, schema)
        self._style = style
        self._schema = schema

    def properties(self) -> str:
        """Of the whole object."""
        listed = _properties(self._schema)
        if listed is None:
            return f"({self._any()})*"
        required = self._schema.get("required", ())
        found = []
        for key, kind in listed.items():
            before = self._lark.marker(self._before(kind).replace("KEY", key))
            found.append(f"({before} {self._value(kind)}){'' if key in required else '?'}")
        return " ".join(found)

    def _before(self, kind: Any) -> str:
        kinds, name = self._style.kinds, kind.get("type") if isinstance(kind, dict) else None
        if _texts(kind) is not None:
            name = "string"
        return self._style.before.replace("KIND", kinds.get(name if isinstance(name, str) else "", kinds.get("", "")))

    def _any(self) -> str:
        """Any element."""
        kinds = set(self._style.kinds.values()) or {""}
        return self._lark.rule(" | ".join(self._any_of(kind) for kind in sorted(kinds)))

    def _any_of(self, kind: str) -> str:
        first, _, second = self._style.before.replace("KIND", kind).partition("KEY")
        head = f"{self._lark.marker(first)} {self._lark.rule(KEY)} {self._lark.marker(second)}"
        if kind and kind != self._style.kinds["string"]:
            return f"{head} {self._json({})} {self._lark.marker(self._style.behind)}"
        return f"{head} {self._lark.up_to([self._style.behind])}"

    def _value(self, kind: Any) -> str:
        """The value of one property, and what stands behind it."""
        texts, behind = _texts(kind), self._style.behind
        if texts is not None:
            return f"({' | '.join(map(self._lark.marker, texts))}) {self._lark.marker(behind)}"
        if not isinstance(kind, dict) or kind.get("type") == "string":
            return self._lark.up_to([behind])
        return f"{self._json(kind)} {self._lark.marker(behind)}"


class _NotationWriter(_Writer):
    """Pairs of keys and values."""

    def __init__(self, style: Notation, lark: Lark, parts: Parts, schema: Any) -> None:
        super().__init__(lark, parts, schema)
        self._style = style
        self._anything = ""  # the rule for any value

    def pairs(self, schema: Any, level: int) -> str:
        """All properties of an object, apart by commas."""
        listed, comma = _properties(schema), self._lark.marker(self._style.comma)
        if listed is None:
            one = f"{self._lark.rule(KEY)} {self._lark.marker(self._style.equals)} {self._any()}"
            return f"({one} ({comma} {one})*)?"
        required = schema.get("required", ())
        beginnings, rest = list[str](), ""
        for key, kind in reversed(list(listed.items())):
            if not re.fullmatch(r"[^\W\d]\w*", key):
                raise _unsayable(f"the property {key[:40]!r}, whose name is no identifier")
            one = f"{self._lark.marker(key + self._style.equals)} {self._value(kind, level + 1)}"
            if key in required:
                beginnings = []
            beginnings.append(f"{one} {rest}")
            rest = self._lark.rule(f"({comma} {one}){'' if key in required else '?'} {rest}")
        if not any(key in required for key in listed):
            beginnings.append('""')
        return f"({' | '.join(beginnings)})"

    def _value(self, kind: Any, level: int) -> str:
        if not self._style.quote:
            return self._json(kind)
        if level > MOST_NESTED:
            raise _unsayable(f"values nested more than {MOST_NESTED} levels deep")
        if not isinstance(kind, dict):
            return self._any()
        if "$ref" in kind:
            return self._value(self._referred(kind["$ref"]), level + 1)
        constants = kind.get("enum", [kind["const"]] if "const" in kind else None)
        if isinstance(constants, list) and constants:
            return f"({' | '.join(map(self._constant, constants))})"
        several = kind.get("anyOf", kind.get("oneOf"))
        if isinstance(several, list) and several:
            return f"({' | '.join(self._value(one, level + 1) for one in several)})"
        names = kind.get("type")
        if isinstance(names, list) and names:
            return f"({' | '.join(self._value({**kind, 'type': name}, level + 1) for name in names)})"
        return self._typed(kind, level)

    def _typed(self, kind: dict[str, Any], level: int) -> str:
        match kind.get("type"):
            case "string":
                return f"{self._lark.marker(self._style.quote)} {self._lark.up_to([self._style.quote])}"
            case "object":
                return f'"{{" {self.pairs(kind, level)} "}}"'
            case "array":
                return self._list(self._value(kind.get("items"), level + 1), kind)
            case "integer" | "number" | "boolean" | "null":
                return self._json(kind)
        return self._any()

    def _list(self, item: str, kind: Mapping[str, Any]) -> str:
        least, most = int(kind.get("minItems", 0)), kind.get("maxItems")
        if most == 0:
            return '"[" "]"'
        comma = self._lark.marker(self._style.comma)
        items = f"{item} ({comma} {item}){{{max(least - 1, 0)},{'' if most is None else int(most) - 1}}}"
        return f'"[" {items} "]"' if least else f'"[" ({items})? "]"'

    def _constant(self, value: Any) -> str:
        if isinstance(value, str):
            return self._lark.marker(f"{self._style.quote}{value}{self._style.quote}")
        if isinstance(value, (dict, list)):
            raise _unsayable("an enum with objects or lists in it")
        return self._lark.marker(json.dumps(value))

    def _any(self) -> str:
        """Any value; a rule that refers to itself."""
        if not self._anything:
            quote, equals = self._lark.marker(self._style.quote), self._lark.marker(self._style.equals)
            if not quote:
                self._anything = self._json({})
                return self._anything
            comma, key = self._lark.marker(self._style.comma), self._lark.rule(KEY)
            number, text = self._json({"type": ["number", "boolean", "null"]}), self._lark.up_to([self._style.quote])
            self._anything = own = self._lark.next_name
            self._lark.rule(
                f'{quote} {text} | {number} | "[" ({own} ({comma} {own})*)? "]"'
                f' | "{{" ({key} {equals} {own} ({comma} {key} {equals} {own})*)? "}}"'
            )
        return self._anything

    def _referred(self, name: Any) -> Any:
        found: Any = self._known
        for part in str(name).removeprefix("#/").split("/"):
            found = found.get(part) if isinstance(found, dict) else None
        if found is None or not str(name).startswith("#/"):
            raise _unsayable(f"the reference {str(name)[:80]!r}, which leads nowhere")
        return found


def _unsayable(what: str) -> ValidationError:
    return ValidationError(
        f"{FIELD}.structural_tag has {what}; the way in which this model writes arguments cannot say that. Change the "
        "tool's parameters.",
        FIELD,
    )
