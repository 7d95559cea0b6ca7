"""JSON schemas that a test invents, and a small judge of what fits them, written apart from the grammar engine."""

from __future__ import annotations

import random
import re
from typing import Any

NAMES = ("name", "age", "tags", "city", "note", "size", "kind", "ok", "a b", 'q"')
PATTERNS = ("^[a-z]{2,6}$", "^[0-9]{3}-[0-9]{2}$", "^(red|green|blue)$", "^[A-F]+x?$")


def invent(chance: random.Random, depth: int = 0) -> dict[str, Any]:
    """One schema, small enough that every output of it is."""
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "const", "pattern"]
    if depth < 3:
        kinds += ["object", "object", "object", "array", "array", "anyOf"]
    kind = "object" if depth == 0 and chance.random() < 0.7 else chance.choice(kinds)
    if kind == "string":
        least = chance.randrange(3)
        return {"type": "string", "minLength": least, "maxLength": least + chance.randrange(1, 8)}
    if kind == "integer":
        low = chance.randrange(-500, 500)
        return {"type": "integer", "minimum": low, "maximum": low + chance.randrange(0, 300)}
    if kind == "number":
        return {"type": "number", "minimum": -1, "maximum": chance.randrange(1, 50)}
    if kind == "enum":
        return {"enum": chance.sample(["one", "two", 3, None, True, 'a "b"', "ä"], chance.randrange(1, 5))}
    if kind == "const":
        return {"const": chance.choice(["fixed", 7, False])}
    if kind == "pattern":
        return {"type": "string", "pattern": chance.choice(PATTERNS), "maxLength": 9}
    if kind == "object":
        names = chance.sample(NAMES, chance.randrange(1, 5))
        return {
            "type": "object",
            "properties": {name: invent(chance, depth + 1) for name in names},
            "required": chance.sample(names, chance.randrange(len(names) + 1)),
            "additionalProperties": False,
        }
    if kind == "array":
        least = chance.randrange(3)
        return {
            "type": "array",
            "items": invent(chance, depth + 1),
            "minItems": least,
            "maxItems": least + chance.randrange(3),
        }
    if kind == "anyOf":
        return {"anyOf": [invent(chance, depth + 1) for _ in range(chance.randrange(1, 4))]}
    return {"type": kind}


def fits(value: Any, schema: dict[str, Any]) -> bool:
    """Whether a value is what a schema of invent() asks for."""
    if "anyOf" in schema:
        return any(fits(value, option) for option in schema["anyOf"])
    if "enum" in schema:
        return any(_same(value, option) for option in schema["enum"])
    if "const" in schema:
        return _same(value, schema["const"])
    kind = schema["type"]
    if kind == "object":
        return (
            isinstance(value, dict)
            and all(name in value for name in schema["required"])
            and all(
                name in schema["properties"] and fits(item, schema["properties"][name]) for name, item in value.items()
            )
        )
    if kind == "array":
        return (
            isinstance(value, list)
            and schema["minItems"] <= len(value) <= schema["maxItems"]
            and all(fits(item, schema["items"]) for item in value)
        )
    if kind == "string":
        return (
            isinstance(value, str)
            and schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", 9)
            and re.search(schema.get("pattern", ""), value) is not None
        )
    if kind in ("integer", "number"):
        right = isinstance(value, int) or (kind == "number" and isinstance(value, float))
        return right and not isinstance(value, bool) and schema["minimum"] <= value <= schema["maximum"]
    return value is None if kind == "null" else isinstance(value, bool)


def _same(one: Any, other: Any) -> bool:
    return one == other and type(one) is type(other)
