"""POST /v1/responses: OpenAI's newer protocol over the same conversations as chat, with its events, and in the background.

What the body means is in responses_body.py, the items of an answer are in response_items.py; what can be done with an
answer later is in kept_responses.py.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from quire.engine.outputs import CompletionOutput, RequestOutput
from quire.errors import ValidationError
from quire.serve.anywhere import anywhere
from quire.serve.blocks import Growth
from quire.serve.caller import caller_of
from quire.serve.conversation import Conversation
from quire.serve.errors import failure_of
from quire.serve.kept_responses import STYLE, follow, kept_response
from quire.serve.logprobs import TokenNames, chat_logprobs
from quire.serve.middleware import JsonRoute
from quire.serve.response_items import Items
from quire.serve.responses_body import ResponsesRequest
from quire.serve.service import Service, new_id
from quire.serve.sse import Emit, json_response, named_event, stream, until_left
from quire.serve.store import Stored
from quire.text.answer_format import AnswerReader
from quire.text.tool_choice import tool_wish

logger = logging.getLogger(__name__)
router = APIRouter(route_class=JsonRoute)


@router.post("/v1/responses")
async def create_response(body: ResponsesRequest, request: Request) -> Response:
    """Answer a conversation; keep the answer for later, unless store is false."""
    service: Service = request.app.state.service
    service.check_model(body.model)
    caller = caller_of(request)
    earlier = await _earlier(service, body.previous_response_id, caller.tenant)
    chat = body.chat(earlier)
    params = chat.params(service.card.defaults, service.card.limit)
    own_id = new_id("resp", request.headers.get("x-request-id"), None).replace("-", "_", 1)
    wish = tool_wish(chat.tools, chat.tool_choice, chat.parallel_tool_calls)
    conversation = Conversation(service, chat, own_id, params, caller, wish=wish)
    answer = _Answer(service, body, conversation, body.kept_messages(earlier))
    if body.background:
        if service.options.max_stored_responses < 1:
            raise ValidationError("This server keeps no responses, so none can run in the background.", "background")
        await service.check_ready()
        stored = answer.in_background()
        if not body.stream:
            return json_response(stored.body)
        following = partial(follow, service, own_id, 0, caller.tenant)
        return await stream(request, following, STYLE, service.options.sse_keep_alive_interval)
    if not body.stream:
        return json_response(await until_left(request, answer.whole()))
    return await stream(request, answer.events, STYLE, service.options.sse_keep_alive_interval)


@router.post("/v1/responses/input_tokens")
async def count_input_tokens(body: ResponsesRequest, request: Request) -> dict[str, Any]:
    """How many tokens the input has, with all that comes before it."""
    service: Service = request.app.state.service
    service.check_model(body.model)
    caller = caller_of(request)
    chat = body.chat(await _earlier(service, body.previous_response_id, caller.tenant))
    text = await Conversation(service, chat, "", service.card.defaults, caller).render()
    return {"object": "response.input_tokens", "input_tokens": len(await service.ids_of(text, special=False))}


async def _earlier(service: Service, previous: str | None, tenant: str) -> list[dict[str, Any]]:
    """The conversation up to and with a previous response."""
    if previous is None:
        return []
    found = await anywhere(kept_response, service, previous, tenant)
    if found["body"]["status"] not in ("completed", "incomplete"):
        raise ValidationError(
            f"The previous response is {found['body']['status']}; a conversation goes on from a finished one.",
            "previous_response_id",
        )
    messages: list[dict[str, Any]] = found["messages"]
    return messages


@dataclass(slots=True)
class _Answer:
    """One response in the making. `kept`: the conversation without its answer."""

    service: Service
    body: ResponsesRequest
    conversation: Conversation
    kept: list[dict[str, Any]]
    items: Items = field(default_factory=Items)
    stored: Stored | None = None  # where it is made in the background
    reader: AnswerReader | None = None  # known with the first output
    created: int = field(default_factory=lambda: int(time.time()))
    number: int = -1  # of the latest event

    # ---------------------------------------------------------------- the three ways

    async def whole(self) -> dict[str, Any]:
        """The response as one object."""
        output = await self.conversation.whole()
        completion = output.outputs[0]
        self._grow(completion)
        self.items.logprobs = self._logprobs(completion)
        return self._ended(completion, self._usage(output, len(completion.token_ids)))

    def in_background(self) -> Stored:
        """Start it, and keep it, queued at first."""
        events: list[bytes] | None = [] if self.body.stream else None
        stored = Stored(
            self.conversation.caller.tenant, self._frame("queued"), items=self.body.input_items(), events=events
        )
        self.stored = stored
        stored.run(self._run(stored))
        self.service.store.put(stored)
        return stored

    async def _run(self, stored: Stored) -> None:
        if stored.events is not None:
            stored.tell(self._event("created", {"response": stored.body}))
        stored.body = self._frame("in_progress")
        try:
            if stored.events is None:
                await self.whole()
            else:
                await self.events(stored.tell)
        except asyncio.CancelledError:
            stored.body = self._frame("cancelled")
            raise
        except Exception as error:
            stored.body = self._failed(error)
            if stored.events is not None:
                stored.tell(self._event("failed", {"response": stored.body}))

    async def events(self, send: Emit) -> None:
        """The response as events; of one in the background it is told already that it was created."""
        tokens = 0
        last: RequestOutput | None = None
        first = ("created", "in_progress") if self.stored is None else ("in_progress",)

        def take(output: RequestOutput) -> None:
            nonlocal tokens, last
            if last is None:
                for kind in first:
                    send(self._event(kind, {"response": self._frame("in_progress")}))
            last = output
            for new in output.outputs:
                tokens += len(new.token_ids)
                found = self._logprobs(new)
                self.items.logprobs += found
                for growth in self._grow(new):
                    for kind, content in self.items.grown(growth, found):
                        send(self._event(kind, content))

        try:
            await self.conversation.answer(take)
        except Exception as error:
            if last is None or self.stored is not None:
                raise
            send(self._event("failed", {"response": self._failed(error)}))
            return
        assert last is not None, "the engine ends every request with an output"
        response = self._ended(last.outputs[0], self._usage(last, tokens))
        items = response["output"]
        for kind, content in self.items.closed(len(items) - 1, items[-1]["status"]):
            send(self._event(kind, content))
        status = response["status"]
        send(self._event(status if status in ("completed", "incomplete") else "failed", {"response": response}))

    def _event(self, kind: str, content: dict[str, Any]) -> bytes:
        self.number += 1
        return named_event({"type": f"response.{kind}", "sequence_number": self.number, **content})

    def _grow(self, completion: CompletionOutput) -> list[Growth]:
        """What the new text adds to the items."""
        if self.reader is None:
            self.reader = self.conversation.answer_format.reader()
        finished = completion.finish_reason is not None
        parts = self.reader.read_in_order(completion.text, finished)
        grown = [growth for said in parts for growth in self.items.blocks.take(said)]
        return grown + self.items.blocks.finish() if finished else grown

    # ---------------------------------------------------------------- objects

    def _ended(self, completion: CompletionOutput, usage: dict[str, Any]) -> dict[str, Any]:
        """The finished response, which is kept where the client wants it."""
        status = {"length": "incomplete", "abort": "cancelled"}.get(completion.finish_reason or "", "completed")
        output = self.items.output("completed" if status == "completed" else "incomplete")
        reason = {"reason": "max_output_tokens"} if status == "incomplete" else None
        response = self._frame(status) | {"output": output, "usage": usage, "incomplete_details": reason}
        if status == "completed":
            response["completed_at"] = int(time.time())
        if self.body.stores and self.service.options.max_stored_responses > 0:
            stored = self.stored or Stored(self.conversation.caller.tenant, response, items=self.body.input_items())
            stored.body, stored.messages = response, [*self.kept, self.items.message()]
            self.service.store.put(stored)
        return response

    def _failed(self, error: Exception) -> dict[str, Any]:
        failure = failure_of(error)
        code = "invalid_prompt" if failure.status < 500 else "server_error"
        return self._frame("failed") | {"error": {"code": code, "message": failure.message}}

    def _frame(self, status: str) -> dict[str, Any]:
        return {
            "id": self.conversation.id,
            "object": "response",
            "created_at": self.created,
            "completed_at": None,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "model": self.service.card.names[0],
            "output": [],
            "usage": None,
            "temperature": self.conversation.params.temperature,
            "top_p": self.conversation.params.top_p,
            "service_tier": "default",
            **self.body.echoed(),
        }

    def _usage(self, output: RequestOutput, tokens: int) -> dict[str, Any]:
        prompt = len(output.prompt_token_ids)
        cached = output.num_cached_tokens if self.service.options.enable_prompt_tokens_details else 0
        return {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
            "output_tokens": tokens,
            "output_tokens_details": {"reasoning_tokens": 0},  # tokens of thoughts are not told apart
            "total_tokens": prompt + tokens,
            **self.conversation.told(),
        }

    def _logprobs(self, completion: CompletionOutput) -> list[dict[str, Any]]:
        if self.conversation.body.top is None or completion.logprobs is None:
            return []
        names = TokenNames(self.service.engine.tokenizer)
        return chat_logprobs(completion.token_ids, completion.logprobs, self.conversation.body.top, names)["content"]
