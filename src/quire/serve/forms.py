"""The form that a client wants its output in: response_format and structured_outputs -> StructuredOutputsParams.

Knows no engine and no HTTP.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quire.core.structured import StructuredOutputsParams
from quire.errors import ValidationError


def wished_form(
    response_format: Mapping[str, Any] | None, structured_outputs: Mapping[str, Any] | None
) -> StructuredOutputsParams | None:
    """What the two fields ask for together; None for plain text. Raises ValidationError."""
    form = _of_response_format(response_format) if response_format is not None else None
    if structured_outputs is None:
        return form
    if form is not None:
        raise ValidationError("response_format and structured_outputs exclude each other.", "structured_outputs")
    if "after" in structured_outputs:
        raise ValidationError("structured_outputs has no field 'after'.", "structured_outputs")
    return StructuredOutputsParams(**{name: value for name, value in structured_outputs.items() if value is not None})


def _of_response_format(given: Mapping[str, Any]) -> StructuredOutputsParams | None:
    kind = given.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return StructuredOutputsParams(json_object=True)
    if kind == "structural_tag":
        return StructuredOutputsParams(structural_tag=given)
    if kind != "json_schema":
        raise ValidationError(
            f"response_format.type must be text, json_object, json_schema or structural_tag; found {str(kind)[:40]!r}.",
            "response_format",
        )
    described = given.get("json_schema")
    schema = described.get("schema") if isinstance(described, Mapping) else None
    if not isinstance(schema, Mapping):
        raise ValidationError(
            "response_format of type json_schema needs json_schema.schema, an object.", "response_format"
        )
    return StructuredOutputsParams(json=schema)
