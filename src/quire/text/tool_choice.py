"""ToolWish: the fields tools, tool_choice and parallel_tool_calls of a request, checked and taken together.

Knows the shape of tools in the OpenAI API; knows no format of any model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from quire.errors import ValidationError

_NAME = re.compile(r"[A-Za-z0-9_.\-]{1,64}")


@dataclass(frozen=True, slots=True)
class ToolWish:
    """The tools of a request by name, with the schemas of their arguments, and whether they must be used.

    `only` is the one tool that must be called; `strict` are those whose arguments must keep to their schemas even where
    the model is free to call.
    """

    choice: Literal["none", "auto", "required"] = "none"
    schemas: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    only: str | None = None
    parallel: bool = True
    strict: frozenset[str] = frozenset()


def tool_wish(tools: Sequence[Mapping[str, Any]] | None, choice: Any, parallel: bool | None) -> ToolWish:
    """The fields tools, tool_choice and parallel_tool_calls together. Raises ValidationError."""
    schemas = dict(_tool(tool, f"tools[{index}]") for index, tool in enumerate(tools or ()))
    many = parallel is not False
    if choice is None:
        choice = "auto" if schemas else "none"
    if choice == "none" or (choice == "auto" and not schemas):
        return ToolWish("none", schemas)
    if not schemas:
        raise ValidationError("tool_choice needs tools to choose from.", "tool_choice")
    if choice in ("auto", "required"):
        return ToolWish(choice, schemas, None, many, _strict(tools or ()))
    if isinstance(choice, Mapping) and choice.get("type") == "allowed_tools":
        return _allowed(choice.get("allowed_tools"), schemas, many)
    name = _chosen(choice, schemas)
    return ToolWish("required", {name: schemas[name]}, name, False)


def _chosen(choice: Any, schemas: Mapping[str, Any]) -> str:
    """The name of a tool, from {"type": "function", "function": {"name": ...}}."""
    function = choice.get("function") if isinstance(choice, Mapping) and choice.get("type") == "function" else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        raise ValidationError(
            'tool_choice must be "none", "auto", "required", {"type": "function", "function": {"name": ...}}, or '
            '{"type": "allowed_tools", "allowed_tools": {"mode": ..., "tools": [...]}}.',
            "tool_choice",
        )
    if name not in schemas:
        raise ValidationError(f"tool_choice names {name[:64]!r}, which is not among the tools.", "tool_choice")
    return name


def _allowed(given: Any, schemas: Mapping[str, Mapping[str, Any]], parallel: bool) -> ToolWish:
    """Some of the tools, of which the model may or must call one; the prompt goes on to show all.

    They count as strict: a form is what keeps a model that is free to call from calling another one.
    """
    mode, tools = (given.get("mode"), given.get("tools")) if isinstance(given, Mapping) else (None, None)
    if mode not in ("auto", "required") or not isinstance(tools, Sequence) or isinstance(tools, str) or not tools:
        raise ValidationError(
            'tool_choice.allowed_tools must have mode "auto" or "required", and a list of tools.', "tool_choice"
        )
    names = [_chosen(tool, schemas) for tool in tools]
    return ToolWish(mode, {name: schemas[name] for name in names}, None, parallel, frozenset(names))


def _strict(tools: Sequence[Mapping[str, Any]]) -> frozenset[str]:
    """The names of the tools that say "strict": true."""
    return frozenset(tool["function"]["name"] for tool in tools if tool["function"].get("strict") is True)


def _tool(tool: Mapping[str, Any], place: str) -> tuple[str, Mapping[str, Any]]:
    function = tool.get("function")
    if tool.get("type") != "function" or not isinstance(function, Mapping):
        raise ValidationError(f"{place} must have the type function, and an object function.", "tools")
    name, schema = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValidationError(f"{place}.function.name must have 1 to 64 letters, digits, _, - or dots.", "tools")
    if schema is None:
        schema = {}
    if not isinstance(schema, Mapping):
        raise ValidationError(f"{place}.function.parameters must be a JSON schema, an object.", "tools")
    return name, schema
