"""What a span's result does to its request: tokens appended, drafts un-counted, and the events that tell of it.

Part of the scheduler, and called by nobody else. Nothing here knows pages, slots or other requests.
"""

from __future__ import annotations

from collections.abc import Mapping

from quire.core.plan import NO_TIMES, Event, FinishReason, Span, SpanResult, TokenLogprobs
from quire.core.request import Request
from quire.core.stats import Stats
from quire.core.stop import STOPPED, Stop, check_stop


def lone_token(span: Span, outcome: SpanResult) -> int | None:
    """The token, where it is all that a span brought."""
    if len(outcome.tokens) != 1 or outcome.slot != span.slot or any(outcome[2:]):
        return None
    return outcome.tokens[0]


def step_on(request: Request, token: int) -> bool:
    """The common case in one go: one position was computed, and its token ends nothing and fills no page.

    False, and nothing changed, if there is more to it.
    """
    if request.computed >= request.quiet_until or token in request.watched:
        return False
    request.tokens.append(token)
    request.computed += 1
    request.in_flight -= 1
    return True


def quiet_until(request: Request) -> int:
    """The computed positions up to which step_on() may take a request without a look at its other fields.

    It has a token more than positions computed while each span brings one.
    """
    if request.first_token is None or request.drafting:
        return 0
    return min(request.publish_at, request.watch_from - 1) - 1


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
