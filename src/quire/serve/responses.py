"""/v1/responses: OpenAI's newer protocol over the same conversations as chat, with its events, its store, background.

What the body means is in responses_body.py, the items of an answer are in response_items.py, what is kept in store.py.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from quire.engine.outputs import CompletionOutput, RequestOutput
from quire.errors import ValidationError
from quire.serve.anywhere import anywhere, topic
from quire.serve.blocks import Growth
from quire.serve.caller import caller_of
from quire.serve.errors import Failure, failure_of
from quire.serve.layers import JsonRoute
from quire.serve.logprobs import TokenNames, chat_logprobs
from quire.serve.response_items import Items
from quire.serve.responses_body import ResponsesRequest
from quire.serve.service import Service, new_id
from quire.serve.sse import EventStyle, event, json_response, named_event, stream, until_left
from quire.serve.store import Stored
from quire.serve.talk import Talk
from quire.text.speech import AnswerReader, tool_wish

logger = logging.getLogger(__name__)
router = APIRouter(route_class=JsonRoute)


def _failed(failure: Failure) -> bytes:
    """An error before there was a response; later ones are events of the response."""
    return b"event: error\n" + event(
        {"type": "error", "code": str(failure.status), "message": failure.message, "param": failure.param}
    )


STYLE = EventStyle(last=b"", failed=_failed)


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
    talk = Talk(service, chat, own_id, params, caller, wish=wish)
    answer = _Answer(service, body, talk, body.kept_messages(earlier))
    if body.background:
        if service.options.max_stored_responses < 1:
            raise ValidationError("This server keeps no responses, so none can run in the background.", "background")
        await service.check_ready()
        return json_response(answer.in_background())
    if not body.stream:
        return json_response(await until_left(request, answer.whole()))
    return await stream(request, answer.events(), STYLE, service.options.sse_keep_alive_interval)


@router.get("/v1/responses/{response_id}")
async def retrieve_response(response_id: str, request: Request) -> Response:
    """A kept response as it is now."""
    found = await anywhere(kept_response, request.app.state.service, response_id, caller_of(request).tenant)
    return json_response(found["body"])


@router.delete("/v1/responses/{response_id}")
async def delete_response(response_id: str, request: Request) -> dict[str, Any]:
    """Forget a kept response."""
    return await anywhere(forget_response, request.app.state.service, response_id, caller_of(request).tenant)


@router.post("/v1/responses/{response_id}/cancel")
async def cancel_response(response_id: str, request: Request) -> Response:
    """End a response that runs in the background; one that has ended stays as it is."""
    found = await anywhere(end_response, request.app.state.service, response_id, caller_of(request).tenant)
    return json_response(found)


@topic
async def kept_response(service: Service, response_id: str, tenant: str) -> dict[str, Any]:
    """A response that this process keeps, and the conversation that led to it."""
    stored = service.store.get(response_id, tenant)
    return {"body": stored.body, "messages": stored.messages}


@topic
async def forget_response(service: Service, response_id: str, tenant: str) -> dict[str, Any]:
    """Forget a response that this process keeps."""
    service.store.remove(response_id, tenant)
    return {"id": response_id, "object": "response", "deleted": True}


@topic
async def end_response(service: Service, response_id: str, tenant: str) -> dict[str, Any]:
    """End a response that this process makes in the background, and return it."""
    stored = service.store.get(response_id, tenant)
    if stored.body["background"] is not True:
        raise ValidationError("Only a response that was created with background can be cancelled.", "response_id")
    if stored.task is not None and not stored.task.done():
        stored.task.cancel()
        await asyncio.gather(stored.task, return_exceptions=True)
        if stored.body["status"] == "queued":  # it had not begun, so it could not say so itself
            stored.body = stored.body | {"status": "cancelled"}
    return service.store.get(response_id, tenant).body


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
    talk: Talk
    kept: list[dict[str, Any]]
    items: Items = field(default_factory=Items)
    reader: AnswerReader | None = None  # known with the first output
    created: int = field(default_factory=lambda: int(time.time()))
    number: int = -1  # of the latest event

    # ---------------------------------------------------------------- the three ways

    async def whole(self) -> dict[str, Any]:
        """The response as one object."""
        output: RequestOutput | None = None
        async for found in self.talk.outputs():
            output = found
        assert output is not None, "the engine ends every request with an output"
        completion = output.outputs[0]
        self._grow(completion)
        self.items.logprobs = self._logprobs(completion)
        return self._ended(completion, self._usage(output, len(completion.token_ids)))

    def in_background(self) -> dict[str, Any]:
        """Start it, and say that it is queued."""
        stored = Stored(self.talk.caller.tenant, self._frame("queued"))
        stored.task = asyncio.ensure_future(self._run(stored))
        self.service.store.put(stored)
        return stored.body

    async def _run(self, stored: Stored) -> None:
        stored.body = self._frame("in_progress")
        try:
            await self.whole()
        except asyncio.CancelledError:
            stored.body = self._frame("cancelled")
            raise
        except Exception as error:
            stored.body = self._frame("failed") | {"error": _error_of(error)}

    async def events(self) -> AsyncGenerator[bytes]:
        """The response as events."""
        tokens = 0
        last: RequestOutput | None = None
        try:
            async for output in self.talk.outputs():
                if last is None:
                    for kind in ("created", "in_progress"):
                        yield self._event(kind, {"response": self._frame("in_progress")})
                last = output
                for new in output.outputs:
                    tokens += len(new.token_ids)
                    found = self._logprobs(new)
                    self.items.logprobs += found
                    for growth in self._grow(new):
                        for kind, content in self.items.grown(growth, found):
                            yield self._event(kind, content)
        except Exception as error:
            if last is None:
                raise
            response = self._frame("failed") | {"error": _error_of(error)}
            yield self._event("failed", {"response": response})
            return
        assert last is not None, "the engine ends every request with an output"
        response = self._ended(last.outputs[0], self._usage(last, tokens))
        items = response["output"]
        for kind, content in self.items.closed(len(items) - 1, items[-1]["status"]):
            yield self._event(kind, content)
        status = response["status"]
        yield self._event(status if status in ("completed", "incomplete") else "failed", {"response": response})

    def _event(self, kind: str, content: dict[str, Any]) -> bytes:
        self.number += 1
        return named_event({"type": f"response.{kind}", "sequence_number": self.number, **content})

    def _grow(self, completion: CompletionOutput) -> list[Growth]:
        """What the new text adds to the items."""
        if self.reader is None:
            self.reader = self.talk.speech.reader()
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
            messages = [*self.kept, self.items.message()]
            self.service.store.put(Stored(self.talk.caller.tenant, response, messages))
        return response

    def _frame(self, status: str) -> dict[str, Any]:
        return {
            "id": self.talk.id,
            "object": "response",
            "created_at": self.created,
            "completed_at": None,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "model": self.service.card.names[0],
            "output": [],
            "usage": None,
            "temperature": self.talk.params.temperature,
            "top_p": self.talk.params.top_p,
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
            **self.talk.told(),
        }

    def _logprobs(self, completion: CompletionOutput) -> list[dict[str, Any]]:
        if self.talk.body.top is None or completion.logprobs is None:
            return []
        names = TokenNames(self.service.engine.tokenizer)
        return chat_logprobs(completion.token_ids, completion.logprobs, self.talk.body.top, names)["content"]


def _error_of(error: Exception) -> dict[str, str]:
    failure = failure_of(error)
    return {"code": "invalid_prompt" if failure.status < 500 else "server_error", "message": failure.message}
