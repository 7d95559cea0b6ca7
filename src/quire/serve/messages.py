"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's protocol over the same conversations as chat.

What the bodies mean is in messages_body.py; only the shape of the answer is made here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from quire.engine.outputs import CompletionOutput, RequestOutput
from quire.errors import OverloadedError
from quire.serve.blocks import Block, Blocks, Growth
from quire.serve.caller import caller_of
from quire.serve.conversation import Conversation
from quire.serve.errors import Failure
from quire.serve.messages_body import MessagesRequest, TokensRequest
from quire.serve.middleware import JsonRoute
from quire.serve.service import Service, new_id
from quire.serve.sse import Emit, EventStyle, event, json_response, named_event, stream, until_left
from quire.text import ChatOptions
from quire.text.answer_format import AnswerReader
from quire.text.tool_choice import tool_wish

router = APIRouter(route_class=JsonRoute)


def _failed(failure: Failure) -> bytes:
    return b"event: error\n" + event(failure.anthropic_body())


# By the kind of a block: the type of the deltas that make it grow, and the field that they bring.
_DELTAS = {
    "thinking": ("thinking_delta", "thinking"),
    "text": ("text_delta", "text"),
    "call": ("input_json_delta", "partial_json"),
}
STYLE = EventStyle(last=b"", failed=_failed)


@router.post("/v1/messages")
async def create_message(body: MessagesRequest, request: Request) -> Response:
    """Answer a conversation, as Anthropic's API does."""
    service: Service = request.app.state.service
    service.check_model(body.model)
    chat = body.chat()
    params = chat.params(service.card.defaults, service.card.limit)
    if params.thinking_token_budget is not None and not service.marks_thoughts:
        params = replace(params, thinking_token_budget=None)  # it has no thoughts that could be limited
    own_id = new_id("msg", request.headers.get("x-request-id"), None)
    wish = tool_wish(chat.tools, chat.tool_choice, chat.parallel_tool_calls)
    answer = _Answer(service, Conversation(service, chat, own_id, params, caller_of(request), wish=wish))
    if not body.stream:
        return json_response(await until_left(request, answer.whole()))
    return await stream(request, answer.events, STYLE, service.options.sse_keep_alive_interval)


@router.post("/v1/messages/count_tokens")
async def count_tokens(body: TokensRequest, request: Request) -> dict[str, int]:
    """How many tokens a conversation has."""
    service: Service = request.app.state.service
    service.check_model(body.model)
    body.check_extra()
    messages = body.chat_messages()  # which finds what is wrong with them
    options = ChatOptions(
        tools=body.chat_tools(),
        add_generation_prompt=not body.continues,
        continue_final_message=body.continues,
        template_kwargs=body.template_kwargs(),
    )
    text = await service.render(messages, options)
    return {"input_tokens": len(await service.ids_of(text, special=False))}


@dataclass(slots=True)
class _Answer:
    """One answer in the making."""

    service: Service
    conversation: Conversation
    blocks: Blocks = field(default_factory=Blocks)
    reader: AnswerReader | None = None  # known with the first output

    async def whole(self) -> dict[str, Any]:
        """The answer as one object."""
        output = await self.conversation.whole()
        completion = output.outputs[0]
        _raise_ended(completion)
        self._grow(completion)
        usage = self._usage(output) | {"output_tokens": len(completion.token_ids)} | self.conversation.told()
        content = [_block(block, block.text) for block in self.blocks.found]
        return self._message(usage) | {"content": content, **self._stopped(completion)}

    async def events(self, send: Emit) -> None:
        """The answer as events."""
        tokens, begun = 0, False

        def take(output: RequestOutput) -> None:
            nonlocal tokens, begun
            if not begun:
                begun = True
                send(named_event({"type": "message_start", "message": self._message(self._usage(output))}))
                send(named_event({"type": "ping"}))
            for completion in output.outputs:
                tokens += len(completion.token_ids)
                _raise_ended(completion)
                for growth in self._grow(completion):
                    for content in self._growth_events(growth):
                        send(content)
                if completion.finish_reason is not None:
                    for content in self._closed(len(self.blocks.found) - 1):
                        send(content)
                    usage = self._usage(output) | {"output_tokens": tokens} | self.conversation.told()
                    send(named_event({"type": "message_delta", "delta": self._stopped(completion), "usage": usage}))

        await self.conversation.answer(take)
        send(named_event({"type": "message_stop"}))

    def _grow(self, completion: CompletionOutput) -> list[Growth]:
        """What the new text adds to the blocks."""
        if self.reader is None:
            self.reader = self.conversation.answer_format.reader()
        finished = completion.finish_reason is not None
        parts = self.reader.read_in_order(completion.text, finished)
        grown = [growth for said in parts for growth in self.blocks.take(said)]
        return grown + self.blocks.finish() if finished else grown

    def _growth_events(self, growth: Growth) -> list[bytes]:
        """A block begins, where it does, and gets its new text."""
        events = []
        if growth.begins:
            events += self._closed(growth.index - 1)
            start = {"index": growth.index, "content_block": _block(growth.block, "")}
            events.append(named_event({"type": "content_block_start", **start}))
        return [*events, _delta(growth.index, *_DELTAS[growth.block.kind], growth.text)]

    def _closed(self, index: int) -> list[bytes]:
        """The end of a block, if there is one of that index. Thoughts end with their signature, which is empty here."""
        if index < 0:
            return []
        signed = self.blocks.found[index].kind == "thinking"
        end = named_event({"type": "content_block_stop", "index": index})
        return [_delta(index, "signature_delta", "signature", ""), end] if signed else [end]

    def _message(self, usage: dict[str, Any]) -> dict[str, Any]:
        return {
            "id": self.conversation.id,
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

    def _stopped(self, completion: CompletionOutput) -> dict[str, Any]:
        by_text = isinstance(completion.stop_reason, str)
        if completion.finish_reason == "length":
            reason = "max_tokens"
        elif self.blocks.has_calls:
            reason = "tool_use"
        else:
            reason = "stop_sequence" if by_text else "end_turn"
        return {"stop_reason": reason, "stop_sequence": completion.stop_reason if by_text else None}


def _raise_ended(completion: CompletionOutput) -> None:
    """Anthropic's protocol has no word for an answer that the server broke off."""
    if completion.finish_reason == "abort":
        raise OverloadedError("The answer was broken off: it was cancelled, or the server shuts down.")


def _block(block: Block, text: str) -> dict[str, Any]:
    """A content block with so much of its text; the input of a call that begins is an empty object."""
    if block.kind == "thinking":
        return {"type": "thinking", "thinking": text, "signature": ""}
    if block.kind == "text":
        return {"type": "text", "text": text}
    return {"type": "tool_use", "id": f"toolu_{block.id}", "name": block.name, "input": _input(text)}


def _input(arguments: str) -> dict[str, Any]:
    """Arguments as an object; what a model wrote that is none stays readable."""
    try:
        found = json.loads(arguments or "{}")
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {"arguments": arguments}


def _delta(index: int, kind: str, name: str, text: str) -> bytes:
    return named_event({"type": "content_block_delta", "index": index, "delta": {"type": kind, name: text}})
