"""What form an output must have: StructuredOutputsParams, plain data that travels with a request.

Judges only what needs no compiler: that exactly one form is asked for and that it has the right type. What the grammar
engine can do with it is decided in quire.grammar.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quire.errors import ValidationError

FORMS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
FIELD = "structured_outputs"


@dataclass(frozen=True, slots=True, kw_only=True)
class Thoughts:
    """What may stand before a form: thoughts, behind `opener` and up to one of `closers`.

    `begun`: the prompt ends inside of them, so they come first and must end. `then` is what the model writes behind them,
    `answer` what it writes before the form, thoughts or none.
    """

    opener: str
    closers: tuple[str, ...]
    begun: bool = False
    then: str = ""
    answer: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputsParams:
    """The form of an output. Exactly one of the first six is given.

    `json` is a JSON schema, as an object or as text; `choice` a list of texts of which the output is one; `grammar` a
    grammar in Lark's or in GBNF notation; `json_object` asks for any JSON object; `structural_tag` is free text with parts
    that keep to forms, in xgrammar's notation. Values are normalized to text, tuples and True, so that equal wishes are
    equal objects. `after` is filled in by the text side, for models that think first.
    """

    json: str | Mapping[str, Any] | None = None
    regex: str | None = None
    choice: tuple[str, ...] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | Mapping[str, Any] | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None
    after: Thoughts | None = None

    def __post_init__(self) -> None:
        """Check types and that there is one form. Raises ValidationError."""
        if self.json_object is False:
            object.__setattr__(self, "json_object", None)
        given = [name for name in FORMS if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) if given else "none of them"
            raise ValidationError(f"{FIELD} takes exactly one of {', '.join(FORMS)}; found {found}", FIELD)
        if self.json is not None:
            object.__setattr__(self, "json", _json_text("json", self.json))
        if self.structural_tag is not None:
            object.__setattr__(self, "structural_tag", _json_text("structural_tag", self.structural_tag))
        if self.choice is not None:
            object.__setattr__(self, "choice", _choices(self.choice))
        for name in ("regex", "grammar", "whitespace_pattern"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                raise ValidationError(f"{FIELD}.{name} must be a string that is not empty", FIELD)
            _check_unicode(name, value or "")
        for name in ("json_object", "disable_any_whitespace", "disable_additional_properties"):
            if getattr(self, name) not in (None, True, False):
                raise ValidationError(f"{FIELD}.{name} must be true or false", FIELD)

    @property
    def form(self) -> str:
        """Which of the forms is given."""
        return next(name for name in FORMS if getattr(self, name) is not None)


def _json_text(name: str, schema: object) -> str:
    """A schema, or a structural tag, as JSON text."""
    if not isinstance(schema, (str, Mapping, bool)):
        raise ValidationError(f"{FIELD}.{name} must be an object, or its text", FIELD)
    try:
        text = schema if isinstance(schema, str) else json.dumps(schema, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValidationError(f"{FIELD}.{name} cannot be written as JSON: {str(error)[:200]}", FIELD) from error
    _check_unicode(name, text)
    return text


def _choices(given: object) -> tuple[str, ...]:
    if isinstance(given, str) or not isinstance(given, (list, tuple)) or not given:
        raise ValidationError(f"{FIELD}.choice must be a list of at least one string", FIELD)
    for item in given:
        if not isinstance(item, str) or not item:
            raise ValidationError(f"{FIELD}.choice must hold strings that are not empty", FIELD)
        _check_unicode("choice", item)
    return tuple(dict.fromkeys(given))


def _check_unicode(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValidationError(f"{FIELD}.{name} is not valid Unicode", FIELD) from error
