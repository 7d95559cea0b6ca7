"""What a span's result does to its request: tokens appended, drafts un-counted, and the events that tell of it.

Part of the scheduler, and called by nobody else. Nothing here knows pages, slots or other requests.
"""

from __future__ import annotations

from collections.abc import Mapping

from quire.core.plan import NO_TIMES, Event, FinishReason, Span, SpanResult, TokenLogprobs
from quire.core.request import Request
from quire.core.stats import Stats
from quire.core.stop import STOPPED, Stop, check_stop


def step_on(request: Request, span: Span, outcome: SpanResult) -> bool:
    """The common case in one go: one position computed, one token that ends nothing, nothing else to note.

    False, and nothing changed, if there is more to it.
    """
    row, _, count, sample, _ = span
    slot, made, _, prompt_logprobs, proposed, _, error = outcome
    tokens = request.tokens
    if (
        count != 1  # drafts would make it more
        or not sample
        or len(made) != 1
        or error is not None
        or slot != row
        or prompt_logprobs
        or proposed
        or request.drafting
        or request.first_token is None
        or made[0] in request.watched
        or len(tokens) + 1 >= request.watch_from
        or request.computed + 1 >= request.publish_at
    ):
        return False
    tokens.append(made[0])
    request.computed += 1
    request.in_flight -= 1
    return True


def contradiction(span: Span, outcome: SpanResult) -> str | None:
    """What is wrong with a result that does not answer its span; the fault of an executor, not of the scheduler."""
    count = len(outcome.tokens)
    if outcome.slot != span.slot:
        return f"the worker answered for row {outcome.slot} instead of {span.slot}"
    if count == span.sample and not span.drafts:
        return None
    if not span.sample:
        return f"the worker made {count} tokens where none was asked for"
    if count == 0 and outcome.pooled is None:
        return "the worker made neither a token nor a vector"
    if count > len(span.drafts) + 1:
        return f"the worker made {count} tokens from {len(span.drafts)} drafts"
    return None


def append(request: Request, span: Span, tokens: tuple[int, ...], totals: Stats) -> Stop | None:
    """Append what a sampling span brought, up to the token that ends the request, and un-count rejected drafts."""
    if span.drafts:
        accepted = len(tokens) - 1
        request.computed -= len(span.drafts) - accepted
        request.planned = request.computed
        request.known += accepted
        totals.accepted_tokens += accepted
    if not tokens:
        return STOPPED  # a vector: there is nothing to go on with
    for token in tokens:
        request.tokens.append(token)
        if token in request.watched or len(request.tokens) >= request.watch_from:
            stop = check_stop(request.tokens, request.rules)
            if stop is not None:
                request.computed = min(request.computed, len(request.tokens))  # the rest was accepted behind the end
                return stop
    return None


def take_drafts(request: Request, drafts: tuple[int, ...]) -> None:
    """Note proposals for the next span. With that one planned already they come too late; the next ones will not."""
    request.drafting = bool(drafts)
    request.drafts = () if request.in_flight else drafts


def unsent(request: Request, span: Span, logprobs: tuple[TokenLogprobs, ...]) -> tuple[TokenLogprobs, ...]:
    """The prompt log-probabilities that were not handed out before a preemption."""
    fresh = logprobs[max(0, request.logprobs_sent - span.start) :]
    request.logprobs_sent += len(fresh)
    return fresh


def times(request: Request) -> dict[str, float]:
    """When the request arrived, was admitted and got its first token, as far as that has happened."""
    found = {"arrival": request.given.arrival}
    if request.scheduled is not None:
        found["scheduled"] = request.scheduled
    if request.first_token is not None:
        found["first_token"] = request.first_token
    return found


def next_event(
    request: Request,
    tokens: tuple[int, ...],
    logprobs: tuple[TokenLogprobs, ...],
    prompt_logprobs: tuple[TokenLogprobs, ...] = (),
    stamps: Mapping[str, float] = NO_TIMES,
) -> Event:
    """An event of a request that goes on."""
    return Event(
        request.given.request_id,
        tokens,
        logprobs,
        prompt_logprobs,
        None,
        None,
        None,
        None,
        request.cached_tokens,
        request.preemptions,
        stamps,
    )


def last_event(
    request: Request,
    reason: FinishReason,
    now: float,
    *,
    tokens: tuple[int, ...] = (),
    logprobs: tuple[TokenLogprobs, ...] = (),
    prompt_logprobs: tuple[TokenLogprobs, ...] = (),
    pooled: tuple[float, ...] | None = None,
    stop_token: int | None = None,
    error: str | None = None,
) -> Event:
    """The event that ends a request."""
    return Event(
        request.given.request_id,
        tokens,
        logprobs,
        prompt_logprobs,
        pooled,
        reason,
        stop_token,
        error,
        max(0, request.cached_tokens),
        request.preemptions,
        {**times(request), "finished": now},
    )
