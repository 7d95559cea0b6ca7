"""From a wished form to the text that llguidance compiles, within limits on its size and depth.

Pure functions of the wish. A form that cannot be had raises ValidationError that names what is wrong with it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

from llguidance import LLMatcher, regex_to_lark
from llguidance.gbnf_to_lark import any_to_lark

from quire.core.structured import FIELD, StructuredOutputsParams, Thoughts
from quire.errors import ValidationError
from quire.grammar.lark import Lark, Parts, Special
from quire.grammar.tags import tag_expression

MOST_DEPTH = 64  # levels of a schema; llguidance has its own limit for expressions and grammars
LONGEST_SCHEMA = 256 * 1024  # characters
LONGEST_REGEX = 16 * 1024
LONGEST_GRAMMAR = 64 * 1024
MOST_CHOICES = 4096
LARK_MODIFIER = re.compile(r"^[ \t]*[?!]{1,2}(?=[a-z_][a-z_0-9]*[ \t]*:(?!:))", re.MULTILINE)  # says how trees look
AFTER_THOUGHTS = r"/[ \r\n\t]{0,8}/"
# Between two parts of a JSON text: a space, or a new line with its indentation. Not more, since a model may like spaces so
# much that it never writes anything else.
ANY_WHITESPACE = r"\x20|\r?\n[\x20\t]{0,24}"

STANDARD_FORMATS = frozenset(
    ("date-time", "date", "time", "duration", "email", "idn-email", "hostname", "idn-hostname", "ipv4", "ipv6", "uri")
    + (
        "uri-reference",
        "iri",
        "iri-reference",
        "uuid",
        "uri-template",
        "json-pointer",
        "relative-json-pointer",
        "regex",
    )
)
_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
_SINGLES = ("items", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames")

# What the grammar engine says of schemas that it does not take -> what to do about it.
_REASONS = (
    (
        r"Unimplemented keys: \[(.*?)\]",
        r"no grammar can keep to the keywords \1 of JSON schema. Leave them out, and check the answer.",
    ),
    (r"Unknown format: (\S+)", r"no grammar can keep to the format \1. Leave it out, and check the answer."),
    (
        r"Resource '(.*?)' is not present",
        r"it refers to the document \1, and none is fetched. Put its schemas into $defs.",
    ),
    (
        r"^oneOf constraints",
        r"the branches of a oneOf may overlap, so that no grammar can keep to it. Use anyOf, or tell them apart.",
    ),
)
# As templates write JSON, so that models find their own habit again.
TEMPLATE_SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def source_of(wish: StructuredOutputsParams, special: Special = MappingProxyType({})) -> str:
    """The grammar of a wish, in llguidance's own notation; `special` are the vocabulary's special tokens by text."""
    if wish.structural_tag is None and wish.after is None:
        return _form_source(wish)
    lark = Lark(special)
    if wish.structural_tag is None:
        body = lark.other(_grammars(_form_source(wish)))
    else:
        tag = str(wish.structural_tag)
        _check_length(tag, "structural_tag", LONGEST_SCHEMA)
        body = tag_expression(tag, lark, _parts(wish))
    return lark.source(body if wish.after is None else f"{_thoughts(wish.after, lark)} {body}")


def _thoughts(after: Thoughts, lark: Lark) -> str:
    """What may, or must, come before the form."""
    thoughts = f"{lark.up_to(after.closers)} {lark.rule(AFTER_THOUGHTS)} {lark.marker(after.then)}"
    if not after.begun:
        thoughts = f"({lark.marker(after.opener)} {thoughts})?"
    return f"{thoughts} {lark.marker(after.answer)}"


def _parts(wish: StructuredOutputsParams) -> Parts:
    """How the forms inside of a structural tag become grammars: like those that stand alone."""

    def schema(given: Any, style: str) -> list[dict[str, Any]]:
        read = _read_schema(given if isinstance(given, str) else json.dumps(given))
        return _grammars(_schema_source(read, wish, TEMPLATE_SPACING if style == "template_json" else None))

    return Parts(schema, lambda text: _grammars(_regex_source(text)), lambda text: _grammars(_grammar_source(text)))


def _grammars(source: str) -> list[dict[str, Any]]:
    """The parts of a source; one in Lark's notation is a single one."""
    return json.loads(source)["grammars"] if source.startswith("{") else [{"lark_grammar": source}]


def _form_source(wish: StructuredOutputsParams) -> str:
    form = wish.form
    if form == "json_object":
        return _schema_source({"type": "object"}, wish)
    if form == "json":
        return _schema_source(_read_schema(str(wish.json)), wish)
    if form == "choice":
        return _choice_source(wish.choice or ())
    if form == "regex":
        return _regex_source(wish.regex or "")
    return _grammar_source(wish.grammar or "")


def _schema_source(schema: Any, wish: StructuredOutputsParams, spacing: Mapping[str, Any] | None = None) -> str:
    schema = _everywhere(schema, _drop_notes)
    schema = _everywhere(schema, partial(_name_by_pattern, root=schema))
    if wish.disable_additional_properties:
        schema = _everywhere(schema, _close)
    options: dict[str, Any] = {"whitespace_flexible": not wish.disable_any_whitespace}
    if spacing is not None:
        options = dict(spacing)
    elif wish.whitespace_pattern is not None:
        _check_length(wish.whitespace_pattern, "whitespace_pattern", LONGEST_REGEX)
        options["whitespace_pattern"] = wish.whitespace_pattern
    elif not wish.disable_any_whitespace:
        options["whitespace_pattern"] = ANY_WHITESPACE
    if isinstance(schema, dict):
        # Clients do not configure the compiler from within a schema.
        schema = {key: value for key, value in schema.items() if key != "x-guidance"}
    try:
        return LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=options)  # type: ignore[arg-type]
    except ValueError as error:
        raise ValidationError(f"{FIELD}.json cannot be used: {reason_of(str(error))}", FIELD) from error


def reason_of(error: str) -> str:
    """Why the grammar engine does not take a form, in words for the one who wrote it."""
    for pattern, words in _REASONS:
        found = re.search(pattern, error)
        if found is not None:
            return found.expand(words)
    return " ".join(error.split())[:300]


def _read_schema(text: str) -> Any:
    """A schema from its text, if it is small enough."""
    if len(text) > LONGEST_SCHEMA:
        raise ValidationError(
            f"{FIELD}.json has {len(text)} characters, at most {LONGEST_SCHEMA} are taken. Split the schema.", FIELD
        )
    try:
        schema = json.loads(text, parse_float=_number)
    except (ValueError, RecursionError) as error:
        raise ValidationError(f"{FIELD}.json is not valid JSON: {str(error)[:200]}", FIELD) from error
    if not isinstance(schema, (dict, bool)):
        raise ValidationError(f"{FIELD}.json must be a JSON schema, an object", FIELD)
    if schema is False:
        raise ValidationError(f"{FIELD}.json is the schema false, which nothing fits.", FIELD)
    if schema is True:
        return {}
    level: list[Any] = [schema]
    for _ in range(MOST_DEPTH):
        level = [item for value in level for item in _inside(value)]
        if not level:
            return schema
    raise ValidationError(f"{FIELD}.json is nested more than {MOST_DEPTH} levels deep. Use a flatter schema.", FIELD)


def _number(text: str) -> int | float:
    """A number; 2.0 is an integer in JSON schema, also where a count is wanted."""
    value = float(text)
    return int(value) if value.is_integer() and abs(value) < 2**53 else value


def _inside(value: Any) -> Iterator[Any]:
    """The objects and lists directly inside one."""
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return (item for item in items if isinstance(item, (dict, list)))


def _everywhere(schema: Any, change: Callable[[dict[str, Any]], None]) -> Any:
    """A copy of a schema in which each schema within it, the inner ones first, was changed."""
    if not isinstance(schema, dict):
        return schema
    found = dict(schema)
    for name in _MAPS:
        if isinstance(found.get(name), dict):
            found[name] = {key: _everywhere(value, change) for key, value in found[name].items()}
    for name in _LISTS:
        if isinstance(found.get(name), list):
            found[name] = [_everywhere(value, change) for value in found[name]]
    for name in _SINGLES:
        if isinstance(found.get(name), dict):
            found[name] = _everywhere(found[name], change)
    change(found)
    return found


def _close(schema: dict[str, Any]) -> None:
    """additionalProperties false wherever a schema lists properties and does not say otherwise."""
    if isinstance(schema.get("properties"), dict):
        schema.setdefault("additionalProperties", False)


def _drop_notes(schema: dict[str, Any]) -> None:
    """Take out what says nothing by the standard: formats that it does not know, and halves without their other half."""
    if isinstance(schema.get("format"), str) and schema["format"] not in STANDARD_FORMATS:
        del schema["format"]
    if "if" in schema and "then" not in schema and "else" not in schema:
        del schema["if"]
    for name, other in (("then", "if"), ("else", "if"), ("minContains", "contains"), ("maxContains", "contains")):
        if other not in schema:
            schema.pop(name, None)


def _name_by_pattern(schema: dict[str, Any], root: Any) -> None:
    """propertyNames as patternProperties, where the object lists no properties: maps whose keys are an enum, as typed
    languages have them. Whatever else it may say is left, and refused."""
    names, values = schema.get("propertyNames"), schema.get("additionalProperties", {})
    if values is False or "properties" in schema or "patternProperties" in schema:
        return
    if isinstance(names, dict) and str(names.get("$ref", "")).startswith("#/"):
        path, names = names["$ref"][2:].split("/"), root
        for part in path:
            names = names.get(part) if isinstance(names, dict) else None
    if not isinstance(names, dict) or not set(names) <= {"type", "title", "description", "enum", "const", "pattern"}:
        return
    if names.get("type", "string") != "string" or len({"enum", "const", "pattern"} & names.keys()) > 1:
        return
    listed = names.get("enum", [names["const"]] if "const" in names else [])
    texts = [name for name in listed if isinstance(name, str)] if isinstance(listed, list) else []
    pattern = names.get("pattern", "^(" + "|".join(map(_literal, texts)) + ")$" if texts else None)
    if pattern is None and ("enum" in names or "const" in names):
        return
    del schema["propertyNames"]
    if pattern is not None:
        schema |= {"patternProperties": {pattern: values}, "additionalProperties": False}


def _choice_source(choices: tuple[str, ...]) -> str:
    """One expression for all choices: as rules of their own they would cost a hundred times as much."""
    if len(choices) > MOST_CHOICES or sum(map(len, choices)) > LONGEST_SCHEMA:
        raise ValidationError(
            f"{FIELD}.choice may hold {MOST_CHOICES} texts of {LONGEST_SCHEMA} characters in all.", FIELD
        )
    return LLMatcher.grammar_from_regex("|".join(f"(?:{_literal(choice)})" for choice in choices))


def _literal(text: str) -> str:
    """A regular expression that matches this text alone."""
    return "".join(
        character
        if character.isascii() and (character.isalnum() or character in " _")
        else f"\\x{{{ord(character):X}}}"
        for character in text
    )


def _regex_source(regex: str) -> str:
    """The whole output must match anyway, so anchors at the two ends say nothing, and llguidance knows none."""
    _check_length(regex, "regex", LONGEST_REGEX)
    body = regex.removeprefix("^")
    if body.endswith("$"):
        backslashes = len(body) - 1 - len(body[:-1].rstrip("\\"))
        if backslashes % 2 == 0:
            body = body[:-1]
    # \d means the ten digits, which is what everybody has in mind, and not those of all scripts.
    return LLMatcher.grammar_from_lark(f"start: /{regex_to_lark(body, 'd')}/")


def _grammar_source(text: str) -> str:
    _check_length(text, "grammar", LONGEST_GRAMMAR)
    text = LARK_MODIFIER.sub("", text)
    try:
        return LLMatcher.grammar_from_lark(any_to_lark(text))
    except Exception as error:  # the converter raises bare exceptions for what it cannot read
        raise ValidationError(f"{FIELD}.grammar cannot be read: {str(error)[:300]}", FIELD) from error


def _check_length(text: str, name: str, longest: int) -> None:
    if len(text) > longest:
        raise ValidationError(f"{FIELD}.{name} has {len(text)} characters, at most {longest} are taken.", FIELD)
