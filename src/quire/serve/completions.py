"""POST /v1/completions: one function per shape of answer. What the engine does for it is in service.py."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from quire.core.params import SamplingParams
from quire.engine.async_engine import LONG_TEXT
from quire.engine.logprobs import Logprob
from quire.engine.outputs import CompletionOutput, RequestOutput
from quire.serve.account import Account
from quire.serve.caller import Caller, caller_of
from quire.serve.logprobs import TokenNames, completion_logprobs, prompt_logprobs
from quire.serve.middleware import JsonRoute
from quire.serve.protocol import CompletionRequest
from quire.serve.service import NOBODY, Job, Service, Take, new_id
from quire.serve.sse import Emit, Frame, json_response, stream, until_left
from quire.serve.usage import Usage
from quire.text.infill import infill_prompt

router = APIRouter(route_class=JsonRoute)

Entry = dict[int, Logprob] | None  # one token's log-probabilities


@router.post("/v1/completions")
async def create_completion(body: CompletionRequest, request: Request) -> Response:
    """Continue one or several prompts."""
    service: Service = request.app.state.service
    service.check_model(body.model)
    body.check()
    answer = _Answer(
        service,
        body,
        new_id("cmpl", request.headers.get("x-request-id"), body.request_id),
        service.with_marks(body.params(service.card.defaults, service.card.limit)),
        caller_of(request),
    )
    if not body.stream:
        return json_response(await until_left(request, answer.whole()))
    return await stream(request, answer.events, patience=service.options.sse_keep_alive_interval)


@dataclass(slots=True)
class _Choice:
    """What a stream must remember of one choice."""

    begun: bool = False
    offset: int = 0  # characters of the tokens reported so far
    tokens: int = 0


@dataclass(slots=True)
class _Answer:
    """One request's answer in the making. Choices are numbered prompt by prompt."""

    service: Service
    body: CompletionRequest
    id: str
    params: SamplingParams
    caller: Caller = NOBODY
    account: Account = field(default_factory=Account)
    created: int = field(default_factory=lambda: int(time.time()))

    async def whole(self) -> dict[str, Any]:
        """The answer as one object."""
        outputs: dict[int, RequestOutput] = {}
        await self._answer(outputs.__setitem__)
        usage = Usage(self.service.options.enable_prompt_tokens_details)
        choices = []
        for index, output in sorted(outputs.items()):
            usage.add_prompt(index, len(output.prompt_token_ids), output.num_cached_tokens)
            for completion in output.outputs:
                usage.completion_tokens += 0 if self.body.only_echo else len(completion.token_ids)
                choices.append(self._choice(index, output, completion))
        return self._frame() | {
            "choices": choices,
            "service_tier": None,
            "system_fingerprint": self.service.card.fingerprint,
            "usage": usage.body() | self.service.told(self.body, self.account),
        }

    async def events(self, send: Emit) -> None:
        """The answer as server-sent events, without the closing [DONE]."""
        forced = self.service.options.enable_force_include_usage
        continuous = forced or self.body.continuous_usage
        frame, fingerprint = Frame(self._frame()), self.service.card.fingerprint
        usage = Usage(self.service.options.enable_prompt_tokens_details)
        states: dict[int, _Choice] = {}
        counts = not self.body.only_echo

        def take(index: int, output: RequestOutput) -> None:
            for completion in output.outputs:
                number = index * self.params.n + completion.index
                state = states.get(number)
                if state is None:
                    state = states[number] = _Choice()
                    usage.add_prompt(index, len(output.prompt_token_ids), output.num_cached_tokens)
                chunk: dict[str, Any] = {"choices": [self._delta(number, output, completion, state)]}
                if completion.finish_reason is not None:
                    chunk["system_fingerprint"] = fingerprint
                if counts:
                    usage.completion_tokens += len(completion.token_ids)
                if continuous:
                    chunk["usage"] = usage.body()
                send(frame.event(chunk))

        await self._answer(take)
        if forced or self.body.include_usage:
            told = usage.body() | self.service.told(self.body, self.account)
            send(frame.event({"choices": [], "system_fingerprint": fingerprint, "usage": told}))

    async def _answer(self, take: Take) -> None:
        special = self.body.add_special_tokens is not False
        prompts = self.body.prompts()
        in_thread = sum(map(len, prompts)) > LONG_TEXT
        jobs = [await self._job(prompt, special, in_thread) for prompt in prompts]
        await self.service.answer(self.id, jobs, self.params, self.body, special, take, self.caller, self.account)

    async def _job(self, prompt: str | list[int], special: bool, in_thread: bool) -> Job:
        room = max(self.body.output_tokens, 1)
        if isinstance(prompt, str):
            if self.body.suffix:
                prompt = infill_prompt(self.service.tokenizer, prompt, self.body.suffix)
            return await self.service.encode(prompt, self.body, special, room, in_thread)
        return self.service.job_of_ids(prompt, self.body, room)

    def _frame(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.service.card.names[0],
        }

    def _names(self) -> TokenNames:
        as_ids = self.body.return_tokens_as_token_ids
        return TokenNames(
            self.service.engine.tokenizer,
            self.service.options.return_tokens_as_token_ids if as_ids is None else as_ids,
        )

    def _prompt_text(self, output: RequestOutput) -> str:
        """The prompt as it was sent, or as its token ids read."""
        if output.prompt is not None and self.body.truncate_prompt_tokens is None:
            return output.prompt
        return self.service.tokenizer.decode(output.prompt_token_ids)

    def _prompt_entries(self, output: RequestOutput) -> list[Entry]:
        """Log-probabilities of the prompt's tokens where they are to be shown; none is known for a first token."""
        if self.body.logprobs is None:
            return []
        return list(output.prompt_logprobs or [None] * len(output.prompt_token_ids))

    def _choice(self, index: int, output: RequestOutput, completion: CompletionOutput) -> dict[str, Any]:
        """One choice of the whole answer."""
        text, token_ids = completion.text, completion.token_ids
        entries: list[Entry] = list(completion.logprobs or [])
        if self.body.echo:
            before = self._prompt_entries(output)
            if self.body.only_echo:
                text, token_ids, entries = self._prompt_text(output), output.prompt_token_ids, before
            else:
                text = self._prompt_text(output) + text
                token_ids, entries = [*output.prompt_token_ids, *token_ids], [*before, *entries]
        most = self.params.logprobs
        shown = None if most is None else completion_logprobs(token_ids, entries, most, self._names())
        wants_ids = bool(self.body.return_token_ids)
        return {
            "index": index * self.params.n + completion.index,
            "text": text,
            "logprobs": shown,
            "finish_reason": completion.finish_reason,
            "stop_reason": completion.stop_reason,
            "token_ids": list(completion.token_ids) if wants_ids else None,
            "prompt_logprobs": prompt_logprobs(output.prompt_logprobs, self._names())
            if self.body.prompt_logprobs is not None
            else None,
            "prompt_token_ids": output.prompt_token_ids if wants_ids else None,
        }

    def _delta(self, number: int, output: RequestOutput, new: CompletionOutput, state: _Choice) -> dict[str, Any]:
        """One choice of a chunk. The first of each choice brings the prompt, where it is echoed."""
        opening, state.begun = not state.begun, True
        wants_ids = self.body.return_token_ids
        choice = {
            "index": number,
            "text": new.text,
            "logprobs": None,
            "finish_reason": new.finish_reason,
            "stop_reason": new.stop_reason,
            "prompt_token_ids": output.prompt_token_ids if wants_ids and opening else None,
            "token_ids": new.token_ids if wants_ids else None,
        }
        echoes = opening and bool(self.body.echo)
        if echoes or self.params.logprobs is not None:
            choice |= self._text_and_logprobs(output, new, state, echoes)
        return choice

    def _text_and_logprobs(
        self, output: RequestOutput, new: CompletionOutput, state: _Choice, echoes: bool
    ) -> dict[str, Any]:
        """The text of a chunk, behind the prompt's where that is echoed, and the log-probabilities of both."""
        text, token_ids, entries = new.text, new.token_ids, list[Entry](new.logprobs or ())
        if echoes:
            before, only = self._prompt_entries(output), self.body.only_echo
            text = self._prompt_text(output) + ("" if only else text)
            token_ids = [*output.prompt_token_ids, *([] if only else token_ids)]
            entries = [*before, *([] if only else entries)]
        shown = None
        if self.params.logprobs is not None and token_ids:
            shown = completion_logprobs(token_ids, entries, self.params.logprobs, self._names(), state.offset)
            state.offset += sum(len(token) for token in shown["tokens"])
        return {"text": text, "logprobs": shown}
