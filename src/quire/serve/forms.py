"""The form that a client wants its output in: response_format and structured_outputs -> StructuredOutputsParams.

Knows no engine and no HTTP.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from quire.core.structured import FIELD, StructuredOutputsParams
from quire.errors import ValidationError

# Older names of the fields of structured_outputs, each a field of the body itself.
GUIDED = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "guided_json_object": "json_object",
    "guided_whitespace_pattern": "whitespace_pattern",
}


def wished_form(
    response_format: Mapping[str, Any] | None,
    structured_outputs: Mapping[str, Any] | None,
    others: Mapping[str, Any],
) -> StructuredOutputsParams | None:
    """What the two fields ask for, or the older ones among the `others`; None for plain text. Raises ValidationError."""
    form = _of_response_format(response_format) if response_format is not None else None
    guided = {GUIDED[name]: value for name, value in others.items() if name in GUIDED and value is not None}
    if guided and structured_outputs is not None:
        raise ValidationError(f"structured_outputs and {_older(others)} exclude each other.", "structured_outputs")
    wished = guided or structured_outputs
    if wished is None:
        return form
    if form is not None:
        field = _older(others) if guided else "structured_outputs"
        raise ValidationError(f"response_format and {field} exclude each other.", field)
    if "after" in wished:
        raise ValidationError("structured_outputs has no field 'after'.", "structured_outputs")
    return StructuredOutputsParams(**{name: value for name, value in wished.items() if value is not None})


def by_its_field(error: ValidationError, field: str) -> ValidationError:
    """What is wrong with a form, told of the field that the client has asked for it with; any other error as it is."""
    if error.field != FIELD:
        return error
    return ValidationError(re.sub(rf"^{FIELD}\.\w+", field, error.message), field)


def _older(others: Mapping[str, Any]) -> str:
    return next(name for name in GUIDED if others.get(name) is not None)


def _of_response_format(given: Mapping[str, Any]) -> StructuredOutputsParams | None:
    kind = given.get("type")
    if kind == "text":
        return None
    if kind == "json_object" and given.get("schema") is None:
        return StructuredOutputsParams(json_object=True)
    if kind == "structural_tag":
        return StructuredOutputsParams(structural_tag=given)
    if kind not in ("json_schema", "json_object"):
        found = "no type" if kind is None else repr(str(kind)[:40])
        raise ValidationError(
            f"response_format.type must be text, json_object, json_schema or structural_tag; found {found}.",
            "response_format",
        )
    described = given.get("json_schema", given)  # servers before OpenAI's had the schema beside the type, some still do
    schema = described.get("schema") if isinstance(described, Mapping) else None
    if not isinstance(schema, Mapping):
        raise ValidationError(
            "response_format of type json_schema needs json_schema.schema, an object.", "response_format"
        )
    return StructuredOutputsParams(json=schema)
