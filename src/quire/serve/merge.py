"""Merging: outputs of a stream put together, so that fewer and larger ones are sent. Knows only outputs."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from quire.engine.outputs import CompletionOutput, RequestOutput


async def every(interval: int, source: AsyncGenerator[RequestOutput]) -> AsyncGenerator[RequestOutput]:
    """The outputs of one request, the first at once, later ones when they hold `interval` tokens, the last as it comes.

    They must be deltas.
    """
    held: RequestOutput | None = None
    begun = False
    async with aclosing(source) as outputs:
        async for output in outputs:
            held = output if held is None else joined(held, output)
            if not begun or output.finished or _most_tokens(held) >= interval:
                begun = True
                yield held
                held = None


def joined(first: RequestOutput, then: RequestOutput) -> RequestOutput:
    """Two deltas of one request as one."""
    completions = {completion.index: completion for completion in first.outputs}
    for later in then.outputs:
        earlier = completions.get(later.index)
        completions[later.index] = later if earlier is None else _joined(earlier, later)
    then.outputs = [completions[index] for index in sorted(completions)]
    then.prompt_logprobs = then.prompt_logprobs or first.prompt_logprobs
    return then


def _joined(first: CompletionOutput, then: CompletionOutput) -> CompletionOutput:
    then.text = first.text + then.text
    then.token_ids = [*first.token_ids, *then.token_ids]
    if first.logprobs is not None and then.logprobs is not None:
        then.logprobs = [*first.logprobs, *then.logprobs]
    return then


def _most_tokens(output: RequestOutput) -> int:
    return max((len(completion.token_ids) for completion in output.outputs), default=0)
