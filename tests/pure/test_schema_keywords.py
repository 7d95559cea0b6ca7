"""Every keyword of JSON schema (draft 2020-12): kept by the grammar, without meaning for one, or refused by its name."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from test_grammar_constraint import END, made, wish

from quire.errors import ValidationError
from quire.grammar import Grammars

INTEGERS = {"type": "array", "items": {"type": "integer"}}
CLOSED = {"type": "object", "additionalProperties": False}
# keyword -> schema, an instance that fits, and one that does not
KEPT: dict[str, tuple[Any, Any, Any]] = {
    "type": ({"type": ["integer", "null"]}, None, "a"),
    "enum": ({"enum": ["a", 1]}, 1, 2),
    "const": ({"const": {"a": 1}}, {"a": 1}, {"a": 2}),
    "properties": (CLOSED | {"properties": {"a": {"type": "integer"}}}, {"a": 1}, {"a": "x"}),
    "required": (CLOSED | {"properties": {"a": {}}, "required": ["a"]}, {"a": 1}, {}),
    "additionalProperties": ({"type": "object", "additionalProperties": {"type": "integer"}}, {"b": 1}, {"b": "x"}),
    "patternProperties": (CLOSED | {"patternProperties": {"^x": {"type": "integer"}}}, {"xy": 1}, {"y": 1}),
    "propertyNames": ({"type": "object", "propertyNames": {"pattern": "^a"}}, {"ab": 1}, {"b": 1}),
    "minProperties": ({"type": "object", "minProperties": 1}, {"a": 1}, {}),
    "maxProperties": ({"type": "object", "maxProperties": 1}, {"a": 1}, {"a": 1, "b": 2}),
    "items": (INTEGERS, [1], ["a"]),
    "prefixItems": ({"type": "array", "prefixItems": [{"type": "integer"}]}, [1, "a"], ["a"]),
    "minItems": (INTEGERS | {"minItems": 1}, [1], []),
    "maxItems": (INTEGERS | {"maxItems": 1}, [1], [1, 2]),
    "minLength": ({"type": "string", "minLength": 2}, "ab", "a"),
    "maxLength": ({"type": "string", "maxLength": 2}, "ab", "abc"),
    "pattern": ({"type": "string", "pattern": "^a+$"}, "aa", "b"),
    "format": ({"type": "string", "format": "date"}, "2026-10-01", "soon"),
    "minimum": ({"type": "integer", "minimum": 3}, 3, 2),
    "maximum": ({"type": "number", "maximum": 1.5}, 1.5, 2),
    "exclusiveMinimum": ({"type": "integer", "exclusiveMinimum": 3}, 4, 3),
    "exclusiveMaximum": ({"type": "integer", "exclusiveMaximum": 3}, 2, 3),
    "multipleOf": ({"type": "integer", "multipleOf": 3}, 6, 7),
    "allOf": ({"allOf": [{"type": "integer"}, {"minimum": 3}]}, 3, 2),
    "anyOf": ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, None, "a"),
    "oneOf": ({"oneOf": [{"type": "integer"}, {"type": "string"}]}, "a", None),
    "$ref": ({"$ref": "#/$defs/a", "$defs": {"a": {"type": "integer"}}}, 1, "a"),
    "$anchor": ({"$ref": "#b", "$defs": {"a": {"$anchor": "b", "type": "integer"}}}, 1, "a"),
    "definitions": ({"$ref": "#/definitions/a", "definitions": {"a": {"type": "integer"}}}, 1, "a"),
    "additionalItems": ({"type": "array", "items": [{"type": "integer"}], "additionalItems": False}, [1], [1, 2]),
}
NOTES: dict[str, Any] = dict.fromkeys(("title", "description", "default", "$comment", "contentEncoding"), "x")
NOTES |= {"examples": [1], "deprecated": True, "readOnly": True, "writeOnly": False, "contentMediaType": "a/b"}
NOTES |= {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": "http://a/b", "nullable": True}
REFUSED: dict[str, Any] = {
    "propertyNames": {"type": "object", "propertyNames": {"minLength": 3}},
    "dependentRequired": {"type": "object", "dependentRequired": {"a": ["b"]}},
    "dependentSchemas": {"type": "object", "dependentSchemas": {"a": {"required": ["b"]}}},
    "unevaluatedProperties": {"type": "object", "unevaluatedProperties": False},
    "unevaluatedItems": {"type": "array", "unevaluatedItems": False},
    "contains": {"type": "array", "contains": {"type": "integer"}},
    "minContains": {"type": "array", "contains": {}, "minContains": 2},
    "maxContains": {"type": "array", "contains": {}, "maxContains": 2},
    "uniqueItems": {"type": "array", "uniqueItems": True},
    "not": {"not": {"type": "string"}},
    "if": {"if": {"type": "string"}, "then": {"minLength": 1}},
    "$dynamicRef": {"$dynamicRef": "#b", "$defs": {"a": {"$dynamicAnchor": "b", "type": "integer"}}},
    "oneOf": {"oneOf": [{"type": "integer"}, {"type": "number"}]},
    "look-around": {"type": "string", "pattern": "^(?=a)a+$"},
    "http://x.y/z": {"$ref": "http://x.y/z"},
}


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return made()


def fits(grammars: Grammars, schema: Any, instance: Any) -> bool:
    text = json.dumps(instance).encode()
    return grammars.constraint(wish(json=schema)).advance([*text, END]) == len(text) + 1


@pytest.mark.parametrize("keyword", KEPT)
def test_it_is_kept(grammars: Grammars, keyword: str) -> None:
    schema, good, bad = KEPT[keyword]
    assert keyword in json.dumps(schema)
    assert fits(grammars, schema, good) and not fits(grammars, schema, bad)


def test_names_of_properties_may_be_an_enum(grammars: Grammars) -> None:
    """As pydantic has dict[Colour, int]."""
    colours = {"$defs": {"Colour": {"type": "string", "enum": ["red", "a.b|c"], "title": "Colour"}}}
    schema: dict[str, Any] = {"type": "object", "additionalProperties": {"type": "integer"}} | colours
    schema["propertyNames"] = {"$ref": "#/$defs/Colour"}
    assert fits(grammars, schema, {"red": 1, "a.b|c": 2}) and fits(grammars, schema, {})
    assert not fits(grammars, schema, {"blue": 1}) and not fits(grammars, schema, {"red": "x"})
    assert not fits(grammars, schema, {"axb|c": 1})
    assert fits(grammars, {"type": "object", "propertyNames": {"type": "string"}}, {"x": 1})
    assert fits(grammars, {"type": "object", "propertyNames": {"const": "x"}}, {"x": 1})
    for names in (
        {"type": "integer"},
        {"enum": [1]},
        {"enum": ["a"], "pattern": "b"},
        {"$ref": "#/no"},
        {"enum": "a"},
        3,
    ):
        with pytest.raises(ValidationError):
            grammars.check(wish(json={"type": "object", "propertyNames": names}))
    with pytest.raises(ValidationError):  # where properties are listed, it would be about them, too
        grammars.check(wish(json=schema | {"properties": {"red": {}}}))


@pytest.mark.parametrize("keyword", NOTES)
def test_it_is_a_note(grammars: Grammars, keyword: str) -> None:
    schema = {"type": "integer", keyword: NOTES[keyword]}
    assert fits(grammars, schema, 1) and not fits(grammars, schema, "a")


@pytest.mark.parametrize("keyword", REFUSED)
def test_it_is_refused_by_its_name(grammars: Grammars, keyword: str) -> None:
    with pytest.raises(ValidationError) as caught:
        grammars.check(wish(json=REFUSED[keyword]))
    assert keyword in str(caught.value) and caught.value.field == "structured_outputs"
    assert "Unimplemented" not in str(caught.value) and "coerce" not in str(caught.value), "words of the grammar engine"
    assert keyword == "look-around" or re.search("Leave them out|Use anyOf|Put its schemas", str(caught.value))
