"""Beam search as requests: in each round every beam has the engine name the likeliest tokens behind it.

Beams find each other's pages through the prefix cache, so a round computes the last token of each. Knows the engine and
its asyncio driver; the rules of the search are those of beams.py.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

from quire.core.params import RequestOutputKind, SamplingParams
from quire.core.plan import FinishReason
from quire.engine.admission import LATE
from quire.engine.async_engine import AsyncEngine, together
from quire.engine.beams import BeamSearch, BeamSearchParams, BeamSearchSequence, Scores
from quire.engine.engine import EngineSettings, Prepared
from quire.engine.logprobs import SampleLogprobs
from quire.engine.outputs import CompletionOutput, RequestOutput
from quire.engine.prompts import TextPrompt, TokensPrompt
from quire.errors import RequestFailedError, ValidationError
from quire.text.stream import Stream
from quire.text.tokenizer import Tokenizer

# Wishes of a request that a search heeds, or that make no difference to it. Any other one must be left out.
HEEDED = frozenset(
    (
        "n",
        "seed",
        "temperature",
        "max_tokens",
        "ignore_eos",
        "logprobs",
        "stop_token_ids",
        "eos_token_ids",
        "include_stop_str_in_output",
        "skip_special_tokens",
        "spaces_between_special_tokens",
        "detokenize",
        "output_kind",
        "stream_interval",
        "structured_outputs",
    )
)


@dataclass(frozen=True, slots=True)
class Wishes:
    """How the requests of a search are to be treated; `timeout`: seconds for the whole search."""

    priority: int = 0
    special: bool = True
    tenant: str = ""
    timeout: float | None = None


def beam_params(
    params: SamplingParams, length_penalty: float, early_stopping: bool | Literal["never"], room: int
) -> BeamSearchParams:
    """A search with n beams, for a request that asks for one. ValidationError names a wish that it cannot heed."""
    plain = SamplingParams()
    for item in fields(SamplingParams):
        if item.name not in HEEDED and getattr(params, item.name) != getattr(plain, item.name):
            raise ValidationError(f"{item.name} has no meaning for a beam search; leave out one of them", item.name)
    return BeamSearchParams(
        beam_width=params.n,
        max_tokens=room if params.max_tokens is None else params.max_tokens,
        ignore_eos=params.ignore_eos,
        stop_token_ids=params.stop_token_ids,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
        include_stop_str_in_output=params.include_stop_str_in_output,
        skip_special_tokens=params.skip_special_tokens,
        logprobs=params.logprobs,
        structured_outputs=params.structured_outputs,
    )


def end_ids(params: BeamSearchParams, settings: EngineSettings) -> frozenset[int]:
    """The tokens that end a sequence."""
    return frozenset(params.stop_token_ids) | frozenset(() if params.ignore_eos else settings.eos_token_ids)


def scoring(params: BeamSearchParams, settings: EngineSettings) -> SamplingParams:
    """What each beam asks for in a round. Raises ValidationError for what the engine's options do not allow."""
    if settings.logprobs_mode != "raw_logprobs":
        raise ValidationError(
            f"Beams are ranked by raw_logprobs, and the option logprobs_mode is {settings.logprobs_mode}. Leave it out",
            "logprobs_mode",
        )
    wanted, most = params.beam_width + len(end_ids(params, settings)), settings.max_logprobs
    told = params.logprobs or 0
    if 0 <= most < told or (told < 0 <= most):
        raise ValidationError(f"logprobs may be at most {most} here (the option max_logprobs)", "logprobs", told)
    if 0 <= most < wanted:
        raise ValidationError(
            f"A beam_width of {params.beam_width} takes the {wanted} likeliest tokens of each beam, and max_logprobs "
            f"is {most}; set the option max_logprobs={wanted}",
            "beam_width",
        )
    return SamplingParams(
        max_tokens=1,
        temperature=0.0,
        logprobs=-1 if told < 0 else max(wanted, told),
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        structured_outputs=params.structured_outputs,
        allowed_logprobs=params.structured_outputs is not None,
    )


def search_of(first: Prepared, params: BeamSearchParams, settings: EngineSettings) -> BeamSearch:
    """The search over a prepared prompt."""
    prompt = first.prompt.token_ids
    limit = min(params.max_tokens, settings.max_model_len - len(prompt))
    return BeamSearch(prompt, params, end_ids(params, settings), limit)


def round_of(first: Prepared, search: BeamSearch, ids: Iterable[str]) -> list[Prepared]:
    """What the running beams ask for, under these ids: each for the token behind what it has found so far."""
    start = len(search.prompt)
    params = replace(first.params, max_tokens=len(search.running[0].tokens) - start + 1)
    return [
        replace(first, request_id=request_id, params=params, generated=tuple(beam.tokens[start:]))
        for beam, request_id in zip(search.running, ids, strict=False)
    ]


def best_tokens(output: RequestOutput) -> Scores:
    """What the model says of the likeliest tokens behind a beam."""
    completion = output.outputs[0]
    if completion.error is not None or not completion.logprobs:
        raise RequestFailedError(f"A beam could not go on: {completion.error or completion.finish_reason}")
    return completion.logprobs[0] or {}


async def beam_output(
    engine: AsyncEngine, prompt: TextPrompt | TokensPrompt, params: BeamSearchParams, ids: Sequence[str], wishes: Wishes
) -> RequestOutput:
    """The results of a search as the completions of one request, the best first. `ids`: one for each beam.

    Raises ValidationError, and what AsyncEngine.generate does. Cancelling it ends its requests.
    """
    settings = engine.engine.settings
    first = await engine.prepare(
        prompt, scoring(params, settings), ids[0], wishes.priority, wishes.special, wishes.tenant, wishes.timeout
    )
    search = search_of(first, params, settings)
    prompt_ids, cached = list(first.prompt.token_ids), None
    while search.running:
        now = time.monotonic()
        if first.deadline is not None and now >= first.deadline:
            return _broken_off(first, params.beam_width, "error", LATE)
        asked = round_of(replace(first, arrival=now, arrival_time=time.time()), search, ids)
        outputs = await together(_last_output(engine, request) for request in asked)
        cached = outputs[0].num_cached_tokens if cached is None else cached
        ended = next((found.outputs[0] for found in outputs if not found.outputs[0].logprobs), None)
        if ended is not None:  # by an abort, a failure, or the end of its time
            return _broken_off(first, params.beam_width, ended.finish_reason, ended.error)
        search.advance([best_tokens(found) for found in outputs])
    found = [
        _completion(index, sequence, len(prompt_ids), params, engine.tokenizer)
        for index, sequence in enumerate(search.sequences())
    ]
    return RequestOutput(ids[0], first.prompt.text, prompt_ids, None, found, True, num_cached_tokens=cached or 0)


def _broken_off(first: Prepared, width: int, reason: FinishReason | None, error: str | None) -> RequestOutput:
    """A search that was ended, whose beams are no results."""
    lost = [CompletionOutput(index, "", [], None, None, reason, None, error) for index in range(width)]
    return RequestOutput(first.request_id, first.prompt.text, list(first.prompt.token_ids), None, lost, True)


async def _last_output(engine: AsyncEngine, request: Prepared) -> RequestOutput:
    """What the engine says of one beam in one round."""
    outputs: list[RequestOutput] = []
    await engine.deliver(request, outputs.append)
    if not outputs:
        raise RequestFailedError("A beam ended without an output")
    return outputs[-1]


def _completion(
    index: int, sequence: BeamSearchSequence, start: int, params: BeamSearchParams, tokenizer: Tokenizer | None
) -> CompletionOutput:
    """A result as a completion, whose tokens are those behind the prompt, its end included."""
    tokens = sequence.tokens[start:]
    ended = sequence.stop_reason is not None
    if ended and not params.include_stop_str_in_output and sequence.stop_reason is not None:
        tokens = [*tokens, sequence.stop_reason]
    text = ""
    if tokenizer is not None:
        shown = SamplingParams(
            skip_special_tokens=params.skip_special_tokens, include_stop_str_in_output=params.include_stop_str_in_output
        )
        stream = Stream(tokenizer, shown, sequence.tokens[:start])
        stream.push(tokens, ended=ended)
        stream.finish()
        text = stream.text
    # The tokenizer's own end is no news to anybody.
    reason = None if tokenizer is not None and sequence.stop_reason == tokenizer.eos_token_id else sequence.stop_reason
    told: SampleLogprobs | None = sequence.logprobs
    return CompletionOutput(index, text, tokens, sequence.cum_logprob, told, sequence.finish_reason, reason)
