"""Text out of the content parts of other protocols; what is not text is refused by its place. Knows no route."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quire.errors import ValidationError


def text_of(content: object, place: str, kinds: tuple[str, ...]) -> str:
    """A string, or the text of a list of parts whose types are among `kinds`, one a line."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValidationError(f"{place} must be a string or a list of parts.", place)
    return "\n".join(_part(part, f"{place}[{index}]", kinds) for index, part in enumerate(content))


def _part(part: object, place: str, kinds: tuple[str, ...]) -> str:
    if not isinstance(part, Mapping):
        raise ValidationError(f"{place} must be an object with a type.", place)
    kind: Any = part.get("type")
    if kind not in kinds:
        raise ValidationError(
            f"{place} has the type {str(kind)[:40]!r}, which is not supported by this server. It takes {', '.join(kinds)}.",
            f"{place}.type",
        )
    text = part.get("text", part.get("refusal"))
    if not isinstance(text, str):
        raise ValidationError(f"{place}.text must be a string.", f"{place}.text")
    return text


def refuse(name: str, why: str = "") -> ValidationError:
    """The error for a field that cannot be honoured."""
    return ValidationError(f"The field {name} is not supported yet by this server.{why or ' Leave it out.'}", name)
