"""The bodies of /v1/messages and of counting, and the ChatRequest that they become. Knows no engine and no HTTP."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from quire.errors import ValidationError
from quire.serve.content_parts import refuse, text_of
from quire.serve.fields import ApiRequest
from quire.serve.protocol import ChatRequest, Timeout

# Known, and impossible here, with the values that ask for nothing.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "mcp_servers": (None, []),
    "container": (None,),
    "context_management": (None,),
    "chat_template": (None,),
}
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


class TokensRequest(ApiRequest):
    """POST /v1/messages/count_tokens, and the part of /v1/messages that the model sees."""

    messages: list[Any]
    system: Any = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def check_extra(self) -> None:
        """Refuse what is known here and cannot be done."""
        for name, value in (self.model_extra or {}).items():
            if name in _REFUSED and value not in _REFUSED[name]:
                raise refuse(name)

    def chat_messages(self) -> list[dict[str, Any]]:
        """The conversation in the form of chat completions."""
        found: list[dict[str, Any]] = []
        if self.system:
            found.append({"role": "system", "content": text_of(self.system, "system", ("text",))})
        for index, message in enumerate(self.messages):
            place = f"messages[{index}]"
            if not isinstance(message, dict) or message.get("role") not in ("user", "assistant"):
                raise ValidationError(f"{place}.role must be user or assistant.", f"{place}.role")
            read = _assistant if message["role"] == "assistant" else _user
            found += read(message.get("content"), f"{place}.content")
        if not self.messages:
            raise ValidationError("The conversation must have at least one message.", "messages")
        return found

    def chat_tools(self) -> list[dict[str, Any]] | None:
        """The tools in the form of chat completions."""
        return [_tool(tool, f"tools[{index}]") for index, tool in enumerate(self.tools or ())] or None

    def template_kwargs(self) -> dict[str, Any]:
        """Variables for the chat template."""
        kind = (self.thinking or {}).get("type")
        given = {} if kind not in ("enabled", "disabled") else {"enable_thinking": kind == "enabled"}
        return {**given, **(self.chat_template_kwargs or {})}

    @property
    def continues(self) -> bool:
        """Whether the last message is the beginning of the answer."""
        return bool(self.messages) and self.messages[-1].get("role") == "assistant"


class MessagesRequest(TokensRequest):
    """POST /v1/messages."""

    max_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)]
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_p: float | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    output_format: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = None
    timeout: Timeout | None = None
    include_account: bool | None = None

    def chat(self) -> ChatRequest:
        """The same request for chat completions."""
        self.check_extra()
        names = ("stream", "temperature", "top_p", "top_k", "timeout", "include_account")
        given = {name: getattr(self, name) for name in names}
        choice, parallel = self._choice()
        given |= {"tools": self.chat_tools(), "tool_choice": choice, "parallel_tool_calls": parallel}
        given |= {"response_format": self._form(), "thinking_token_budget": self._budget()}
        given["reasoning_effort"] = (self.output_config or {}).get("effort")
        body = ChatRequest(
            model=self.model,
            messages=self.chat_messages(),
            max_tokens=self.max_tokens,
            stop=self.stop_sequences,
            chat_template_kwargs=self.template_kwargs(),
            continue_final_message=self.continues,
            **{name: value for name, value in given.items() if value is not None},
        )
        body.check()
        return body

    def _choice(self) -> tuple[Any, bool | None]:
        """tool_choice and parallel_tool_calls."""
        if self.tool_choice is None:
            return None, None
        parallel = False if self.tool_choice.get("disable_parallel_tool_use") is True else None
        kind = self.tool_choice.get("type")
        if kind == "tool":
            return {"type": "function", "function": {"name": self.tool_choice.get("name")}}, parallel
        if not isinstance(kind, str) or kind not in _CHOICES:
            raise ValidationError("tool_choice.type must be auto, any, tool or none.", "tool_choice")
        return _CHOICES[kind], parallel

    def _form(self) -> dict[str, Any] | None:
        """response_format."""
        layout = (self.output_config or {}).get("format") or self.output_format
        if layout is None:
            return None
        if not isinstance(layout, Mapping) or layout.get("type") != "json_schema":
            raise ValidationError("The output format's type must be json_schema.", "output_config.format")
        return {"type": "json_schema", "json_schema": {"name": "answer", "schema": layout.get("schema")}}

    def _budget(self) -> int | None:
        """How many tokens thoughts may take."""
        if self.thinking is None or self.thinking.get("type") in ("disabled", "adaptive"):
            return None
        budget = self.thinking.get("budget_tokens")
        if self.thinking.get("type") != "enabled" or not isinstance(budget, int) or not 1 <= budget < self.max_tokens:
            raise ValidationError(
                "thinking must be disabled, adaptive, or enabled with budget_tokens below max_tokens.", "thinking"
            )
        return budget


def _tool(tool: dict[str, Any], place: str) -> dict[str, Any]:
    if tool.get("type") not in (None, "custom"):
        raise refuse(f"{place}.type", " It takes tools of your own: name, description, input_schema.")
    function = {
        "name": tool.get("name"),
        "description": tool.get("description"),
        "parameters": tool.get("input_schema"),
    }
    if tool.get("strict") is not None:
        function["strict"] = tool["strict"]
    return {"type": "function", "function": {name: value for name, value in function.items() if value is not None}}


def _blocks(content: object, place: str) -> list[dict[str, Any]]:
    """Content as a list of blocks that have a type."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list) or not all(isinstance(block, dict) for block in content):
        raise ValidationError(f"{place} must be a string or a list of parts.", place)
    return content


def _user(content: object, place: str) -> list[dict[str, Any]]:
    """A message of the user: the results of tools, each a message of its own, and text."""
    found: list[dict[str, Any]] = []
    texts: list[dict[str, Any]] = []
    for index, block in enumerate(_blocks(content, place)):
        if block.get("type") != "tool_result":
            texts.append(block)
            continue
        if not isinstance(block.get("tool_use_id"), str):
            where = f"{place}[{index}].tool_use_id"
            raise ValidationError(f"{where} must be the id of a tool_use block.", where)
        result = block.get("content") or ""
        text = text_of(result, f"{place}[{index}].content", ("text",))
        call = {"tool_call_id": block["tool_use_id"]}
        found.append({"role": "tool", "content": f"Error: {text}" if block.get("is_error") is True else text, **call})
    if texts or not found:
        found.append({"role": "user", "content": text_of(texts, place, ("text",))})
    return found


def _assistant(content: object, place: str) -> list[dict[str, Any]]:
    """A message of the assistant: thoughts, text, and calls."""
    thoughts, calls = "", []
    texts: list[dict[str, Any]] = []
    for index, block in enumerate(_blocks(content, place)):
        if block.get("type") == "thinking":
            thoughts += str(block.get("thinking") or "")
        elif block.get("type") == "tool_use":
            where = f"{place}[{index}]"
            if not isinstance(block.get("input"), dict) or not isinstance(block.get("name"), str):
                raise ValidationError(f"{where} must have a name, and an object input.", where)
            function = {"name": block["name"], "arguments": json.dumps(block["input"], ensure_ascii=False)}
            calls.append({"id": str(block.get("id")), "type": "function", "function": function})
        elif block.get("type") != "redacted_thinking":
            texts.append(block)
    message: dict[str, Any] = {"role": "assistant", "content": text_of(texts, place, ("text",)) if texts else ""}
    if thoughts:
        message["reasoning"] = thoughts
    if calls:
        message["tool_calls"] = calls
    return [message]
