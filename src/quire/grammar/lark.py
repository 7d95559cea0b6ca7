"""Lark: a grammar in the making, in llguidance's notation. Marks in it may be special tokens of a vocabulary."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from quire.core.structured import FIELD
from quire.errors import ValidationError

TEXT = r"/(.|\n)*/"
MOST_RULES = 2048

Special = Mapping[str, int]  # the special tokens of a vocabulary by their text; those that end an output are -1


@dataclass(slots=True)
class Lark:
    """A grammar in the making: rules in Lark's notation, and whole grammars that they refer to as @name."""

    special: Special
    rules: list[str] = field(default_factory=list)
    others: list[dict[str, Any]] = field(default_factory=list)

    @property
    def next_name(self) -> str:
        """Of the rule that will be added next, which may refer to itself."""
        return f"r{len(self.rules)}"

    def rule(self, body: str, lazy: bool = False) -> str:
        """Add a rule; its name."""
        name = self.next_name
        if len(self.rules) >= MOST_RULES:
            raise ValidationError(f"{FIELD}.structural_tag has more than {MOST_RULES} parts.", FIELD)
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
