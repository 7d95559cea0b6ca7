"""Conversation: from a conversation to the engine's outputs, the same for every route that takes messages.

Knows no shape of an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from quire.core.params import SamplingParams
from quire.engine.outputs import RequestOutput
from quire.serve.account import Account
from quire.serve.caller import Caller
from quire.serve.protocol import ChatRequest
from quire.serve.service import NOBODY, Service
from quire.text import ChatOptions
from quire.text.answer_format import AnswerFormat, answer_format_of
from quire.text.tool_choice import ToolWish


@dataclass(slots=True)
class Conversation:
    """One request's conversation. `prompt` is known when the first output has come."""

    service: Service
    body: ChatRequest
    id: str
    params: SamplingParams
    caller: Caller = NOBODY
    prompt: str = ""
    account: Account = field(default_factory=Account)
    wish: ToolWish | None = None  # of a route that reads calls and thoughts out of the text; None leaves it as it is
    answer_format: AnswerFormat = field(default_factory=AnswerFormat)  # known with the first output

    async def render(self) -> str:
        """The conversation as the model reads it."""
        body = self.body
        options = ChatOptions(
            tools=body.tools,
            documents=body.documents,
            add_generation_prompt=body.generation_prompt,
            continue_final_message=bool(body.continue_final_message),
            template=body.chat_template,
            template_kwargs=body.template_variables(),
        )
        return await self.service.render(body.messages, options)

    async def answer(self, take: Callable[[RequestOutput], None]) -> None:
        """Call take() with each thing that the engine says, until it has said all. Cancelling it ends the request."""
        body = self.body
        self.prompt = await self.render()
        if self.wish is not None:
            self.answer_format = self._answer_format(self.wish)
            self.params = self.answer_format.params(self.params)
        special = bool(body.add_special_tokens)
        job = await self.service.encode(self.prompt, body, special, self.params.max_tokens or 1)
        await self.service.answer(
            self.id, [job], self.params, body, special, lambda _, output: take(output), self.caller, self.account
        )

    async def whole(self) -> RequestOutput:
        """The one output of a request that wants no stream."""
        outputs: list[RequestOutput] = []
        await self.answer(outputs.append)
        return outputs[-1]

    def _answer_format(self, wish: ToolWish) -> AnswerFormat:
        options = self.service.options
        return answer_format_of(
            self.service.tokenizer,
            self.body.chat_template,
            wish,
            self.params,
            self.prompt,
            options.tool_call_parser,
            options.reasoning_parser,
        )

    def told(self) -> dict[str, Any]:
        """The part of `usage` that is quire's own."""
        return self.service.told(self.body, self.account)

    def role(self) -> str:
        """The role of the answer: that of the last message where it is continued."""
        last: Any = self.body.messages[-1]
        if not self.body.generation_prompt and isinstance(last, Mapping) and isinstance(last.get("role"), str):
            return last["role"]
        return self.service.options.response_role
