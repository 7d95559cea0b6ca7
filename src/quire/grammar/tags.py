"""Structural tags: free text with parts that must keep to a form, as a grammar.

The notation is xgrammar's, in its present and its first shape. Pure functions; what cannot be had raises ValidationError.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from quire.core.structured import FIELD
from quire.errors import ValidationError
from quire.grammar.lark import TEXT, Lark, Parts
from quire.grammar.non_json_arguments import STYLES, non_json

MOST_LEVELS = 16  # of formats within formats
JSON_STYLES = ("json", "template_json")  # spaced freely, or as chat templates write JSON


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
        if style in STYLES:
            return non_json(given.get("json_schema", {}), style, self._lark, self._parts)
        if style not in JSON_STYLES:
            raise _wrong(f"asks for the style {str(style)[:40]!r}; known are {', '.join((*JSON_STYLES, *STYLES))}")
        return self._lark.other(self._parts.schema(given.get("json_schema", {}), style))

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
