"""POST /v1/chat/completions: one function per shape of answer. What the engine does for it is in service.py."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from quire.engine.outputs import CompletionOutput, RequestOutput
from quire.serve.caller import caller_of
from quire.serve.conversation import Conversation
from quire.serve.legacy_calls import in_old_form
from quire.serve.logprobs import TokenNames, chat_logprobs, prompt_logprobs
from quire.serve.middleware import JsonRoute
from quire.serve.protocol import ChatRequest
from quire.serve.service import Service, new_id
from quire.serve.sse import Emit, Frame, json_response, stream, until_left
from quire.serve.usage import Usage
from quire.text.answer_format import AnswerReader
from quire.text.tool_choice import tool_wish

router = APIRouter(route_class=JsonRoute)


@router.post("/v1/chat/completions")
async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
    """Answer a conversation."""
    service: Service = request.app.state.service
    service.check_model(body.model)
    body.check()
    answer = _Answer(
        service,
        body,
        Conversation(
            service,
            body,
            new_id("chatcmpl", request.headers.get("x-request-id"), body.request_id),
            body.params(service.card.defaults, service.card.limit),
            caller_of(request),
            wish=tool_wish(body.tools, body.tool_choice, body.parallel_tool_calls),
        ),
    )
    if not body.stream:
        return json_response(await until_left(request, answer.whole()))
    return await stream(request, answer.events, patience=service.options.sse_keep_alive_interval)


@dataclass(slots=True)
class _Answer:
    """One request's answer in the making."""

    service: Service
    body: ChatRequest
    conversation: Conversation
    created: int = field(default_factory=lambda: int(time.time()))
    readers: dict[int, AnswerReader] = field(default_factory=dict)  # by the number of the choice

    async def whole(self) -> dict[str, Any]:
        """The answer as one object."""
        output = await self.conversation.whole()
        usage = Usage(self.service.options.enable_prompt_tokens_details)
        usage.add_prompt(0, len(output.prompt_token_ids), output.num_cached_tokens)
        usage.completion_tokens = sum(len(completion.token_ids) for completion in output.outputs)
        wants_ids = bool(self.body.return_token_ids)
        return self._frame("chat.completion") | {
            "choices": [self._choice(completion) for completion in output.outputs],
            "service_tier": None,
            "system_fingerprint": self.service.card.fingerprint,
            "usage": usage.body() | self.conversation.told(),
            "prompt_logprobs": prompt_logprobs(output.prompt_logprobs, self._names()),
            "prompt_token_ids": output.prompt_token_ids if wants_ids else None,
            "prompt_text": self.conversation.prompt if self.body.return_prompt_text else None,
        }

    async def events(self, send: Emit) -> None:
        """The answer as server-sent events, without the closing [DONE]. Each choice begins with its role."""
        forced = self.service.options.enable_force_include_usage
        continuous = forced or self.body.continuous_usage
        frame, fingerprint = Frame(self._frame("chat.completion.chunk")), self.service.card.fingerprint
        usage = Usage(self.service.options.enable_prompt_tokens_details)
        begun = False

        def chunk(choice: dict[str, Any], finished: bool = False) -> dict[str, Any]:
            content: dict[str, Any] = {"choices": [choice]}
            if finished:
                content["system_fingerprint"] = fingerprint
            if continuous:
                content["usage"] = usage.body()
            return content

        def take(output: RequestOutput) -> None:
            nonlocal begun
            if not begun or output.finished:
                usage.add_prompt(0, len(output.prompt_token_ids), output.num_cached_tokens)
            if not begun:
                begun = True
                for number in range(self.conversation.params.n):
                    send(frame.event(chunk(self._opening(number)) | self._prompt_ids(output)))
            for completion in output.outputs:
                usage.completion_tokens += len(completion.token_ids)
                for delta in self._deltas(completion):
                    send(frame.event(chunk(delta, delta["finish_reason"] is not None)))

        await self.conversation.answer(take)
        if forced or self.body.include_usage:
            told = usage.body() | self.conversation.told()
            send(frame.event({"choices": [], "system_fingerprint": fingerprint, "usage": told}))

    def _frame(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.conversation.id,
            "object": kind,
            "created": self.created,
            "model": self.service.card.names[0],
        }

    def _prompt_ids(self, output: RequestOutput) -> dict[str, Any]:
        return {"prompt_token_ids": output.prompt_token_ids} if self.body.return_token_ids else {}

    def _names(self) -> TokenNames:
        as_ids = self.body.return_tokens_as_token_ids
        return TokenNames(
            self.service.engine.tokenizer,
            self.service.options.return_tokens_as_token_ids if as_ids is None else as_ids,
        )

    def _echoed(self) -> str:
        """The last message's text where the answer shall begin with it."""
        last = self.body.messages[-1]
        if not self.body.echo or last.get("role") != self.conversation.role():
            return ""
        content = last.get("content")
        return content if isinstance(content, str) else ""

    def _logprobs(self, completion: CompletionOutput) -> dict[str, Any] | None:
        if self.body.top is None or completion.logprobs is None:
            return None
        return chat_logprobs(completion.token_ids, completion.logprobs, self.body.top, self._names())

    @property
    def _shows_thoughts(self) -> bool:
        return self.body.include_reasoning is not False

    def _reader(self, number: int) -> AnswerReader:
        """What reads the choice of that number."""
        if number not in self.readers:
            self.readers[number] = self.conversation.answer_format.reader()
        return self.readers[number]

    def _choice(self, completion: CompletionOutput) -> dict[str, Any]:
        """One choice of the whole answer."""
        reader = self._reader(completion.index)
        said = reader.read(completion.text, finished=True)
        content = self._echoed() + said.content
        message: dict[str, Any] = {
            "role": self.conversation.role(),
            "content": None if said.calls and not content else content,
            "refusal": None,
            "annotations": None,
            "audio": None,
            "function_call": None,
            "reasoning": said.reasoning or None if self._shows_thoughts else None,
        }
        if said.calls:
            message["tool_calls"] = [{key: call[key] for key in ("id", "type", "function")} for call in said.calls]
        choice = {
            "index": completion.index,
            "message": message,
            "logprobs": self._logprobs(completion),
            "finish_reason": reader.finish_reason(completion.finish_reason),
            "stop_reason": completion.stop_reason,
            "token_ids": list(completion.token_ids) if self.body.return_token_ids else None,
        }
        return in_old_form(choice, "message") if self.body.functions else choice

    def _opening(self, number: int) -> dict[str, Any]:
        """The first chunk of a choice."""
        delta = {"role": self.conversation.role(), "content": self._echoed()}
        return {"index": number, "delta": delta, "logprobs": None, "finish_reason": None}

    def _deltas(self, new: CompletionOutput) -> list[dict[str, Any]]:
        """One choice of each chunk that an output becomes. The end comes behind a call, never with it: only so do the
        clients' helpers report the call as complete.
        """
        choice = self._delta(new)
        if choice is None:
            return []
        if choice["finish_reason"] is None or "tool_calls" not in choice["delta"]:
            return [choice]
        end = {"index": choice["index"], "delta": {}, "logprobs": None, "finish_reason": choice["finish_reason"]}
        return [choice | {"finish_reason": None, "stop_reason": None}, end | {"stop_reason": choice["stop_reason"]}]

    def _delta(self, new: CompletionOutput) -> dict[str, Any] | None:
        """One choice of a later chunk; None while the text may still become a call and nothing else is to be told."""
        reader = self._reader(new.index)
        said = reader.read(new.text, new.finish_reason is not None)
        delta: dict[str, Any] = {}
        if said.reasoning and self._shows_thoughts:
            delta["reasoning"] = said.reasoning
        if said.calls:
            delta["tool_calls"] = list(said.calls)
        if said.content or not delta:
            delta["content"] = said.content
        silent = new.text and not said.content and len(delta) == 1 and "content" in delta
        if silent and new.finish_reason is None and not self.body.return_token_ids and self.body.top is None:
            return None
        choice: dict[str, Any] = {
            "index": new.index,
            "delta": delta,
            "logprobs": self._logprobs(new),
            "finish_reason": reader.finish_reason(new.finish_reason),
        }
        if new.finish_reason is not None:
            choice["stop_reason"] = new.stop_reason
        if self.body.return_token_ids:
            choice["token_ids"] = list(new.token_ids)
        return in_old_form(choice, "delta") if self.body.functions else choice
