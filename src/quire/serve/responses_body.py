"""The body of POST /v1/responses, and the ChatRequest it becomes. Knows no engine and no HTTP."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

from quire.errors import ValidationError
from quire.serve.content_parts import refuse, text_of
from quire.serve.fields import ApiRequest
from quire.serve.protocol import ChatRequest, Int32, Penalty, Timeout, XArg
from quire.serve.response_items import chat_call

_KINDS = ("input_text", "output_text", "text", "refusal")
_ROLES = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}
_PREFIXES = {"message": "msg", "function_call": "fc", "function_call_output": "fco", "reasoning": "rs"}
_LOGPROBS = "message.output_text.logprobs"
# Known, and impossible here so far, with the values that ask for nothing.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "prompt": (None,),
    "conversation": (None,),
    "truncation": (None, "disabled"),
    "context_management": (None, []),
    "max_tool_calls": (None,),
    "moderation": (None,),
}


# Fields that chat completions have under the same names; those of the second row are no part of OpenAI's protocol.
_PASSED_ON = (
    *("temperature", "top_p", "stream"),
    *("top_k", "min_p", "seed", "presence_penalty", "frequency_penalty", "repetition_penalty", "stop", "ignore_eos"),
    *("logit_bias", "structured_outputs", "vllm_xargs", "chat_template", "chat_template_kwargs", "cache_salt"),
    *("priority", "timeout", "include_account"),
)


class ResponsesRequest(ApiRequest):
    """POST /v1/responses."""

    input: Any
    instructions: str | None = None
    previous_response_id: str | None = None
    max_output_tokens: Int32 | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Int32 | None = None
    seed: Int32 | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: Penalty | None = None
    stop: str | list[str] | None = None
    ignore_eos: bool | None = None
    logit_bias: dict[str, float] | None = None
    structured_outputs: dict[str, Any] | None = None
    vllm_xargs: dict[str, XArg | list[XArg]] | None = None
    top_logprobs: Int32 | None = None
    include: list[str] | None = None
    text: dict[str, Any] | None = None
    reasoning: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    background: bool | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    cache_salt: str | None = None
    priority: Int32 | None = None
    timeout: Timeout | None = None
    user: str | None = None
    include_account: bool | None = None

    def check(self) -> None:
        """What one field cannot tell alone. Raises ValidationError."""
        for name, value in (self.model_extra or {}).items():
            if name in _REFUSED and value not in _REFUSED[name]:
                raise refuse(name)
        for wish in self.include or ():
            if wish not in (_LOGPROBS, "reasoning.encrypted_content"):
                raise refuse("include", f" It can include {_LOGPROBS}.")
        if self.background and self.store is False:
            raise ValidationError("background needs store: nobody could ask for the answer.", "background")

    @property
    def stores(self) -> bool:
        """Whether the client wants the answer kept."""
        return self.store is not False

    def chat(self, earlier: Sequence[dict[str, Any]]) -> ChatRequest:
        """The same request for chat completions; `earlier` are the messages of the previous response."""
        self.check()
        messages = [*earlier, *self._input_messages()]
        if self.instructions:  # those of earlier responses do not carry over
            messages = [{"role": "system", "content": self.instructions}, *messages]
        given = {name: getattr(self, name) for name in _PASSED_ON}
        given |= {"tools": [_tool(tool, f"tools[{index}]") for index, tool in enumerate(self.tools or ())] or None}
        given |= {"tool_choice": _choice(self.tool_choice), "parallel_tool_calls": self.parallel_tool_calls}
        given["response_format"] = self._form()
        if self.reasoning and self.reasoning.get("effort") is not None:
            given["reasoning_effort"] = str(self.reasoning["effort"])[:32]
        if _LOGPROBS in (self.include or ()):
            given |= {"logprobs": True, "top_logprobs": self.top_logprobs or 0}
        body = ChatRequest(
            model=self.model,
            messages=messages,
            max_completion_tokens=self.max_output_tokens,
            **{name: value for name, value in given.items() if value is not None},
        )
        body.check()
        return body

    def input_items(self) -> list[dict[str, Any]]:
        """The input as items with ids, to be asked for later. It must have been checked by chat()."""
        given = [{"role": "user", "content": self.input}] if isinstance(self.input, str) else self.input
        return [_kept_item(item) for item in given]

    def kept_messages(self, earlier: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """What a later response goes on from, less this one's answer."""
        return [*earlier, *self._input_messages()]

    def _form(self) -> dict[str, Any] | None:
        """text.format as the response_format of chat completions."""
        layout = (self.text or {}).get("format")
        if layout is not None and not isinstance(layout, dict):
            raise ValidationError("text.format must be an object.", "text.format")
        if layout is None or layout.get("type") != "json_schema":
            return layout
        return {"type": "json_schema", "json_schema": {name: layout[name] for name in layout if name != "type"}}

    def _input_messages(self) -> list[dict[str, Any]]:
        if isinstance(self.input, str):
            return [{"role": "user", "content": self.input}]
        if not isinstance(self.input, list) or not self.input:
            raise ValidationError("input must be a string, or a list with at least one item.", "input")
        found: list[dict[str, Any]] = []
        for index, item in enumerate(self.input):
            _take_item(item, f"input[{index}]", found)
        return found

    def echoed(self) -> dict[str, Any]:
        """The fields of the response that repeat the request."""
        return {
            "background": bool(self.background),
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "metadata": self.metadata or {},
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "previous_response_id": self.previous_response_id,
            "reasoning": {"effort": (self.reasoning or {}).get("effort"), "summary": None},
            "store": self.stores,
            "text": {"format": {"type": "text"}, **(self.text or {})},
            "tool_choice": "auto" if self.tool_choice is None else self.tool_choice,
            "tools": self.tools or [],
            "top_logprobs": self.top_logprobs or 0,
            "truncation": "disabled",
            "user": self.user,
        }


def _tool(tool: dict[str, Any], place: str) -> dict[str, Any]:
    """A tool as chat completions write it."""
    if tool.get("type") != "function":
        raise refuse(f"{place}.type", " It takes tools of type function.")
    return {"type": "function", "function": {name: value for name, value in tool.items() if name != "type"}}


def _choice(choice: Any) -> Any:
    """tool_choice as chat completions write it."""
    if not isinstance(choice, dict):
        return choice
    if choice.get("type") == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}
    if choice.get("type") == "allowed_tools":
        tools = choice.get("tools")
        return {
            "type": "allowed_tools",
            "allowed_tools": {
                "mode": choice.get("mode"),
                "tools": [_choice(tool) for tool in tools] if isinstance(tools, list) else tools,
            },
        }
    raise refuse("tool_choice.type", " It takes none, auto, required, a function, or allowed_tools.")


def _take_item(item: object, place: str, found: list[dict[str, Any]]) -> None:
    """Add one item of the input to the chat messages. Calls and thoughts belong to the assistant's message."""
    if not isinstance(item, dict):
        raise ValidationError(f"{place} must be an object.", place)
    kind = item.get("type", "message")
    if kind == "message":
        role = item.get("role")
        if role not in _ROLES:
            raise ValidationError(f"{place}.role must be one of {', '.join(_ROLES)}.", f"{place}.role")
        text = text_of(item.get("content"), f"{place}.content", _KINDS)
        if role == "assistant":
            if found and found[-1].get("content"):
                found.append({"role": "assistant", "content": text})
            else:
                _assistant(found)["content"] = text
        else:
            found.append({"role": _ROLES[role], "content": text})
    elif kind == "function_call":
        if not all(isinstance(item.get(name), str) for name in ("call_id", "name", "arguments")):
            raise ValidationError(f"{place} must have the strings call_id, name and arguments.", place)
        call = chat_call(item["call_id"], item["name"], item["arguments"])
        _assistant(found).setdefault("tool_calls", []).append(call)
    elif kind == "function_call_output":
        if not isinstance(item.get("call_id"), str):
            raise ValidationError(f"{place}.call_id must be a string.", f"{place}.call_id")
        text = text_of(item.get("output"), f"{place}.output", _KINDS)
        found.append({"role": "tool", "content": text, "tool_call_id": item["call_id"]})
    elif kind == "reasoning":
        parts = [part.get("text") for part in item.get("content") or () if isinstance(part, dict)]
        last = _assistant(found)
        last["reasoning"] = last.get("reasoning", "") + "".join(part for part in parts if isinstance(part, str))
    else:
        kinds = "message, function_call, function_call_output, reasoning"
        raise ValidationError(
            f"{place} has the type {str(kind)[:40]!r}, which is not supported yet by this server. It takes {kinds}.",
            f"{place}.type",
        )


def _kept_item(item: dict[str, Any]) -> dict[str, Any]:
    kind = item.get("type", "message")
    kept = {"id": f"{_PREFIXES[kind]}_{uuid.uuid4().hex}", "type": kind, "status": "completed"} | item
    if kind == "message" and isinstance(item["content"], str):
        said = {"type": "output_text", "annotations": []} if item["role"] == "assistant" else {"type": "input_text"}
        kept["content"] = [said | {"text": item["content"]}]
    return kept


def _assistant(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The assistant's message at the end of the conversation, a new one if the last is another's."""
    if not found or found[-1]["role"] != "assistant":
        found.append({"role": "assistant", "content": ""})
    return found[-1]
