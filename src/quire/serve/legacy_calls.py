"""functions and function_call of chat completions: how OpenAI wrote tools before there were several calls in one answer.

A request in the old form becomes one with tools, its answer gets the old form back. Plain data; knows no engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from quire.errors import ValidationError


def tools_of(functions: Sequence[Any]) -> list[dict[str, Any]]:
    """`functions` as tools."""
    if not functions:
        raise ValidationError("functions is an empty list. Leave it out, or name at least one function.", "functions")
    return [{"type": "function", "function": function} for function in functions]


def choice_of(function_call: Any) -> Any:
    """`function_call` as tool_choice. Raises ValidationError."""
    if function_call in (None, "none", "auto"):
        return function_call
    if isinstance(function_call, Mapping) and isinstance(function_call.get("name"), str):
        return {"type": "function", "function": {"name": function_call["name"]}}
    raise ValidationError('function_call must be "none", "auto" or {"name": ...}.', "function_call")


def messages_of(messages: Sequence[Any]) -> list[Any]:
    """Messages with the calls and results of the old form written as those of tools; all others as they are.

    A result belongs to the call before it, for there was one at a time. Raises ValidationError.
    """
    found: list[Any] = []
    number = 0
    for index, message in enumerate(messages):
        call = message.get("function_call") if isinstance(message, Mapping) else None
        if call is not None:
            number += 1
            place = f"messages[{index}].function_call"
            if not isinstance(call, Mapping) or not all(
                isinstance(call.get(key), str) for key in ("name", "arguments")
            ):
                raise ValidationError(f"{place} must have the strings name and arguments.", place)
            rest = {key: value for key, value in message.items() if key != "function_call"}
            function = {"name": call["name"], "arguments": call["arguments"]}
            message = rest | {"tool_calls": [{"id": f"call_{number}", "type": "function", "function": function}]}
        elif isinstance(message, Mapping) and message.get("role") == "function":
            message = {**message, "role": "tool", "tool_call_id": f"call_{number}"}
        found.append(message)
    return found


def in_old_form(choice: dict[str, Any], part: str) -> dict[str, Any]:
    """A choice of an answer, or of a chunk of it, whose `part` ("message" or "delta") names a call in the old form."""
    said = dict(choice[part])
    for call in said.pop("tool_calls", ()):  # parts of the one call, in a chunk
        before = said.get("function_call") or {}
        said["function_call"] = before | {key: before.get(key, "") + text for key, text in call["function"].items()}
    reason = choice["finish_reason"]
    return choice | {part: said, "finish_reason": "function_call" if reason == "tool_calls" else reason}
