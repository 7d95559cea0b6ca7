"""Structural tags: free text with parts that must keep to a form, as a grammar. Also marks, which may be special tokens.

The notation is xgrammar's, in its present and its first shape. Pure functions; what cannot be had raises ValidationError.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from quire.core.structured import FIELD
from quire.errors import ValidationError

TEXT = r"/(.|\n)*/"
MOST_LEVELS = 16  # of formats within formats
MOST_FORMATS = 2048
STYLES = ("json", "template_json")  # spaced freely, or as chat templates write JSON
# Objects written with an element for each property: what stands before and behind its value.
ELEMENTS = {
    "qwen_xml": ("<parameter=KEY>\n", "\n</parameter>\n"),
    "minimax_xml": ('<parameter name="KEY">', "</parameter>\n"),
    "glm_xml": ("<arg_key>KEY</arg_key>\n<arg_value>", "</arg_value>\n"),
}

Special = Mapping[str, int]  # the special tokens of a vocabulary by their text; those that end an output are -1


@dataclass(slots=True)
class Lark:
    """A grammar in the making: rules in Lark's notation, and whole grammars that they refer to as @name."""

    special: Special
    rules: list[str] = field(default_factory=list)
    others: list[dict[str, Any]] = field(default_factory=list)

    def rule(self, body: str, lazy: bool = False) -> str:
        """Add a rule; its name."""
        name = f"r{len(self.rules)}"
        if len(self.rules) >= MOST_FORMATS:
            raise ValidationError(f"{FIELD}.structural_tag has more than {MOST_FORMATS} parts.", FIELD)
        self.rules.append(f"{name}{'[lazy]' if lazy else ''}: {body}")
        return name

    def other(self, grammars: list[dict[str, Any]]) -> str:
        """Add a whole grammar, whose own parts come along; how rules refer to it."""
        name = f"g{len(self.others)}"
        self.others.append({**grammars[0], "name": name})
        self.others += grammars[1:]
        return f"@{name}"

    def source(self, start: str) -> str:
        """The grammar as llguidance reads it."""
        text = "\n".join([f"start: {start}", *self.rules])
        return json.dumps({"grammars": [{"name": "output", "lark_grammar": text}, *self.others]})

    def marker(self, text: str) -> str:
        """A text that must stand there; special tokens in it are these tokens, and not their letters."""
        parts, plain = [], ""
        while text:
            token = next((name for name in self.special if text.startswith(name)), None)
            if token is None:
                plain, text = plain + text[0], text[1:]
                continue
            if plain:
                parts.append(quoted(plain))
            if self.special[token] >= 0:
                parts.append(f"<[{self.special[token]}]>")
            plain, text = "", text[len(token) :]
        return " ".join([*parts, quoted(plain)] if plain else parts)

    def up_to(self, ends: Iterable[str]) -> str:
        """Any text, as far as the first of these marks, which is part of it."""
        return "(" + " | ".join(self._up_to(end) for end in ends) + ")"

    def _up_to(self, end: str) -> str:
        first = next((name for name in self.special if name in end), None)
        if first is not None:  # text never holds a special token, so it ends there by itself
            plain, _, _ = end.partition(first)
            if not plain:
                return f"{self.rule(TEXT)} {self.marker(end)}"  # where the mark ends the output, that follows by itself
            return f"{self.rule(_until(plain), lazy=True)} {self.marker(end[len(plain) :])}"
        return self.rule(_until(end), lazy=True)


def quoted(text: str) -> str:
    """A text in Lark's notation."""
    return json.dumps(text)


def _until(text: str) -> str:
    literal = "".join(
        character
        if character.isascii() and (character.isalnum() or character in " _")
        else f"\\x{{{ord(character):X}}}"
        for character in text
    )
    return rf"/(.|\n)*{literal}/"


@dataclass(frozen=True, slots=True)
class Parts:
    """How the forms inside of tags become grammars: from a schema, an expression, or a grammar's text."""

    schema: Callable[[Any, str], list[dict[str, Any]]]  # with its style
    regex: Callable[[str], list[dict[str, Any]]]
    grammar: Callable[[str], list[dict[str, Any]]]


def tag_expression(text: str, lark: Lark, parts: Parts) -> str:
    """The expression for a structural tag, given as JSON."""
    try:
        given = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _wrong(f"is not valid JSON: {str(error)[:200]}") from error
    if not isinstance(given, dict) or given.get("type", "structural_tag") != "structural_tag":
        raise _wrong('must be an object of the type "structural_tag"')
    wanted = given.get("format")
    if wanted is None:
        wanted = _first_shape(given)
    try:
        return _Reader(lark, parts).expression(wanted, 0, last=True)
    except ValidationError:
        raise
    except (TypeError, ValueError, AttributeError, RecursionError) as error:  # clients may write anything anywhere
        raise _wrong(f"has a part of a wrong type: {str(error)[:120]}") from error


def _first_shape(given: Mapping[str, Any]) -> dict[str, Any]:
    """{"structures": [{begin, schema, end}], "triggers": [...]} as triggered tags."""
    structures, triggers = given.get("structures"), given.get("triggers")
    if not isinstance(structures, list) or not isinstance(triggers, list):
        raise _wrong("needs a format, or structures and triggers")
    tags = [
        {
            "begin": item.get("begin"),
            "content": {"type": "json_schema", "json_schema": item.get("schema", {})},
            "end": item.get("end"),
        }
        for item in structures
        if isinstance(item, dict)
    ]
    return {"type": "triggered_tags", "triggers": triggers, "tags": tags}


class _Reader:
    """Turns formats into expressions, from the outside in."""

    def __init__(self, lark: Lark, parts: Parts) -> None:
        self._lark = lark
        self._parts = parts
        self._formats: dict[str, Callable[[Mapping[str, Any], int, bool], str]] = {
            "const_string": lambda given, level, last: self._lark.marker(_string(given, "value")),
            "json_schema": self._schema,
            "regex": lambda given, level, last: self._lark.other(self._parts.regex(_string(given, "pattern"))),
            "grammar": lambda given, level, last: self._lark.other(self._parts.grammar(_string(given, "grammar"))),
            "any_text": self._any_text,
            "sequence": self._sequence,
            "or": self._or,
            "tag": self._tag,
            "triggered_tags": self._triggered,
            "tags_with_separator": self._separated,
        }

    def expression(self, given: Any, level: int, last: bool) -> str:
        """One format. `last`: nothing comes behind it."""
        if level > MOST_LEVELS:
            raise _wrong(f"has formats nested more than {MOST_LEVELS} levels deep")
        kind = given.get("type") if isinstance(given, dict) else None
        if kind not in self._formats:
            raise _wrong(f"has a format of type {str(kind)[:40]!r}; known are {', '.join(self._formats)}")
        return self._formats[kind](given, level, last)

    def _schema(self, given: Mapping[str, Any], level: int, last: bool) -> str:
        style = given.get("style", "json")
        if style in ELEMENTS:
            return self._elements(given.get("json_schema", {}), *ELEMENTS[style])
        if style not in STYLES:
            raise _wrong(f"asks for the style {str(style)[:40]!r}; known are {', '.join((*STYLES, *ELEMENTS))}")
        return self._lark.other(self._parts.schema(given.get("json_schema", {}), style))

    def _elements(self, schema: Any, before: str, behind: str) -> str:
        """An object as one element for each property, in the order of the schema; texts are not put into quotes."""
        properties = schema.get("properties") if isinstance(schema, dict) else None
        if not isinstance(properties, dict):
            if isinstance(schema, dict) and schema.get("additionalProperties") is False:
                return ""
            first, _, second = before.partition("KEY")
            key = self._lark.rule(r"/[A-Za-z_][A-Za-z0-9_]*/")
            one = f"{self._lark.marker(first)} {key} {self._lark.marker(second)} {self._lark.up_to([behind])}"
            return f"({one})*"
        required = schema.get("required", ())
        parts = []
        for key, kind in properties.items():
            value = self._value(kind, schema, behind)
            parts.append(f"({self._lark.marker(before.replace('KEY', key))} {value}){'' if key in required else '?'}")
        return " ".join(parts)

    def _value(self, kind: Any, schema: Mapping[str, Any], behind: str) -> str:
        """The value of one property, and what stands behind it."""
        choices = kind.get("enum") if isinstance(kind, dict) else None
        if isinstance(choices, list) and choices and all(isinstance(item, str) for item in choices):
            return f"({' | '.join(map(self._lark.marker, choices))}) {self._lark.marker(behind)}"
        if not isinstance(kind, dict) or kind.get("type") == "string":
            return self._lark.up_to([behind])
        known = {name: schema[name] for name in ("$defs", "definitions") if name in schema}
        return f"{self._lark.other(self._parts.schema({**known, **kind}, 'template_json'))} {self._lark.marker(behind)}"

    def _any_text(self, given: Mapping[str, Any], level: int, last: bool) -> str:
        if not last:
            raise _wrong("has any_text where something else must follow; put it into a tag with an end")
        return self._lark.rule(TEXT)

    def _sequence(self, given: Mapping[str, Any], level: int, last: bool) -> str:
        elements = _items(given, "elements")
        return " ".join(
            self.expression(item, level + 1, last and index == len(elements) - 1) for index, item in enumerate(elements)
        )

    def _or(self, given: Mapping[str, Any], level: int, last: bool) -> str:
        return "(" + " | ".join(self.expression(item, level + 1, last) for item in _items(given, "elements")) + ")"

    def _tag(self, given: Mapping[str, Any], level: int, last: bool) -> str:
        return " ".join(filter(None, (self._lark.marker(_string(given, "begin")), self._inside(given, level))))

    def _inside(self, tag: Mapping[str, Any], level: int) -> str:
        """The content of a tag and its end."""
        content, end = tag.get("content"), tag.get("end", "")
        ends = [end] if isinstance(end, str) else end
        if not isinstance(ends, list) or not all(isinstance(item, str) for item in ends) or not ends:
            raise _wrong("has a tag whose end is neither a string nor a list of strings")
        if isinstance(content, dict) and content.get("type") == "any_text" and all(ends):
            return self._lark.up_to(ends)
        inside = self.expression(content, level + 1, last=not any(ends))
        closing = " | ".join(self._lark.marker(item) if item else '""' for item in ends)
        return f"{inside} ({closing})" if any(ends) else inside

    def _triggered(self, given: Mapping[str, Any], level: int, last: bool) -> str:
        """Free text; where a trigger comes up, one of its tags begins."""
        if not last:
            raise _wrong("has triggered_tags where something else must follow")
        tags = _items(given, "tags")
        choices = []
        for trigger in _items(given, "triggers"):
            rests = [
                " ".join(
                    filter(None, (self._lark.marker(_string(tag, "begin")[len(trigger) :]), self._inside(tag, level)))
                )
                for tag in tags
                if isinstance(tag, dict) and isinstance(trigger, str) and _string(tag, "begin").startswith(trigger)
            ]
            if not trigger or not rests:
                raise _wrong(f"has the trigger {str(trigger)[:40]!r}, with which no tag begins")
            choices.append(f"{self._lark.up_to([trigger])} ({' | '.join(rests)})")
        triggers = tuple(item for item in given["triggers"] if isinstance(item, str))
        if not all(_string(tag, "begin").startswith(triggers) for tag in tags):
            raise _wrong("has a tag that begins with no trigger")
        one = self._lark.rule(" | ".join(choices))
        text = self._lark.rule(TEXT)
        if given.get("stop_after_first"):
            return one if given.get("at_least_one") else f"({one} | {text})"
        return f"{one}{'+' if given.get('at_least_one') else '*'} {text}"

    def _separated(self, given: Mapping[str, Any], level: int, last: bool) -> str:
        tags = [self.expression({"type": "tag", **tag}, level + 1, last=False) for tag in _items(given, "tags")]
        one = self._lark.rule(" | ".join(tags))
        separator = self._lark.marker(_string(given, "separator")) if given.get("separator") else ""
        most = given.get("max_tags")
        times = "*" if most is None else f"{{0,{int(most) - 1}}}"
        several = one if given.get("stop_after_first") or most == 1 else f"{one} ({separator} {one}){times}"
        return several if given.get("at_least_one") else f"({several})?"


def _string(given: Mapping[str, Any], name: str) -> str:
    value = given.get(name)
    if not isinstance(value, str):
        raise _wrong(f"needs {name}, a string, in a format of type {str(given.get('type', 'tag'))[:40]!r}")
    return value


def _items(given: Mapping[str, Any], name: str) -> list[Any]:
    value = given.get(name)
    if not isinstance(value, list) or not value or not all(isinstance(item, (dict, str)) for item in value):
        raise _wrong(f"needs {name}, a list that is not empty, in a format of type {str(given.get('type'))[:40]!r}")
    return value


def _wrong(what: str) -> ValidationError:
    return ValidationError(f"{FIELD}.structural_tag {what}.", FIELD)
