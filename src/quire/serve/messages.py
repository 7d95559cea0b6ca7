"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's protocol over the same conversations as chat.

Text in and out. The body becomes a ChatRequest; only the shape of the answer is made here.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from quire.engine.outputs import CompletionOutput, RequestOutput
from quire.errors import OverloadedError, ValidationError
from quire.serve.caller import caller_of
from quire.serve.errors import Failure
from quire.serve.layers import JsonRoute
from quire.serve.parts import refuse, text_of
from quire.serve.protocol import ApiRequest, ChatRequest, Timeout
from quire.serve.service import Service, new_id
from quire.serve.sse import EventStyle, event, json_response, named_event, stream, until_left
from quire.serve.talk import Talk
from quire.text import ChatOptions

router = APIRouter(route_class=JsonRoute)

_REFUSED: dict[str, tuple[Any, ...]] = {
    "tools": (None, []),
    "tool_choice": (None, {"type": "none"}),
    "thinking": (None, {"type": "disabled"}),
    "mcp_servers": (None, []),
    "container": (None,),
    "context_management": (None,),
    "output_format": (None,),
    "output_config": (None, {}),
    "chat_template": (None,),
}


class TokensRequest(ApiRequest):
    """POST /v1/messages/count_tokens, and the part of /v1/messages that the model sees."""

    messages: list[Any]
    system: Any = None
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
            found.append(
                {"role": message["role"], "content": text_of(message.get("content"), f"{place}.content", ("text",))}
            )
        if not self.messages:
            raise ValidationError("The conversation must have at least one message.", "messages")
        return found

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
    timeout: Timeout | None = None
    include_account: bool | None = None

    def chat(self) -> ChatRequest:
        """The same request for chat completions."""
        self.check_extra()
        given = {
            name: getattr(self, name)
            for name in ("stream", "temperature", "top_p", "top_k", "timeout", "include_account")
        }
        body = ChatRequest(
            model=self.model,
            messages=self.chat_messages(),
            max_tokens=self.max_tokens,
            stop=self.stop_sequences,
            chat_template_kwargs=self.chat_template_kwargs,
            continue_final_message=self.continues,
            **{name: value for name, value in given.items() if value is not None},
        )
        body.check()
        return body


def _failed(failure: Failure) -> bytes:
    return b"event: error\n" + event(failure.anthropic_body())


STYLE = EventStyle(last=b"", failed=_failed)


@router.post("/v1/messages")
async def create_message(body: MessagesRequest, request: Request) -> Response:
    """Answer a conversation, as Anthropic's API does."""
    service: Service = request.app.state.service
    service.check_model(body.model)
    chat = body.chat()
    params = chat.params(service.card.defaults, service.card.limit)
    own_id = new_id("msg", request.headers.get("x-request-id"), None)
    answer = _Answer(service, Talk(service, chat, own_id, params, caller_of(request)))
    if not body.stream:
        return json_response(await until_left(request, answer.whole()))
    return await stream(request, answer.events(), STYLE, service.options.sse_keep_alive_interval)


@router.post("/v1/messages/count_tokens")
async def count_tokens(body: TokensRequest, request: Request) -> dict[str, int]:
    """How many tokens a conversation has."""
    service: Service = request.app.state.service
    service.check_model(body.model)
    body.check_extra()
    messages = body.chat_messages()  # which finds what is wrong with them
    options = ChatOptions(
        add_generation_prompt=not body.continues,
        continue_final_message=body.continues,
        template_kwargs={**service.chat_template_kwargs, **(body.chat_template_kwargs or {})},
    )
    text = await service.render(messages, options)
    return {"input_tokens": len(service.tokenizer.encode(text, add_special_tokens=False))}


@dataclass(slots=True)
class _Answer:
    """One answer in the making."""

    service: Service
    talk: Talk

    async def whole(self) -> dict[str, Any]:
        """The answer as one object."""
        output: RequestOutput | None = None
        async for found in self.talk.outputs():
            output = found
        assert output is not None, "the engine ends every request with an output"
        completion = output.outputs[0]
        _raise_ended(completion)
        usage = self._usage(output) | {"output_tokens": len(completion.token_ids)} | self.talk.told()
        return self._message(usage) | {"content": [{"type": "text", "text": completion.text}], **_stopped(completion)}

    async def events(self) -> AsyncGenerator[bytes]:
        """The answer as events."""
        tokens, begun = 0, False
        async for output in self.talk.outputs():
            if not begun:
                begun = True
                yield named_event({"type": "message_start", "message": self._message(self._usage(output))})
                yield named_event(
                    {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
                )
                yield named_event({"type": "ping"})
            for completion in output.outputs:
                tokens += len(completion.token_ids)
                _raise_ended(completion)
                if completion.text:
                    delta = {"type": "text_delta", "text": completion.text}
                    yield named_event({"type": "content_block_delta", "index": 0, "delta": delta})
                if completion.finish_reason is not None:
                    yield named_event({"type": "content_block_stop", "index": 0})
                    usage = self._usage(output) | {"output_tokens": tokens} | self.talk.told()
                    yield named_event({"type": "message_delta", "delta": _stopped(completion), "usage": usage})
        yield named_event({"type": "message_stop"})

    def _message(self, usage: dict[str, Any]) -> dict[str, Any]:
        return {
            "id": self.talk.id,
            "type": "message",
            "role": "assistant",
            "model": self.service.card.names[0],
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage,
        }

    def _usage(self, output: RequestOutput) -> dict[str, Any]:
        """Tokens; those found in the cache are shown apart where the operator lets them be seen."""
        cached = output.num_cached_tokens if self.service.options.enable_prompt_tokens_details else 0
        return {
            "input_tokens": len(output.prompt_token_ids) - cached,
            "output_tokens": 0,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
        }


def _raise_ended(completion: CompletionOutput) -> None:
    """Anthropic's protocol has no word for an answer that the server broke off."""
    if completion.finish_reason == "abort":
        raise OverloadedError("The answer was broken off: it was cancelled, or the server shuts down.")


def _stopped(completion: CompletionOutput) -> dict[str, Any]:
    by_text = isinstance(completion.stop_reason, str)
    reason = "max_tokens" if completion.finish_reason == "length" else "stop_sequence" if by_text else "end_turn"
    return {"stop_reason": reason, "stop_sequence": completion.stop_reason if by_text else None}
