"""The messages of one engine step: what to compute (StepPlan), what came out (StepResult), what changed (Event).

All are immutable. A plan speaks of positions, never of token values, so the next plan can be made while the previous one
still runs. Nothing here knows tensors, text or time.

Span, SpanResult and Event are made once per request and step: as named tuples they cost a quarter of a frozen dataclass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, NamedTuple

from quire.core.params import PoolingParams, SamplingParams

FinishReason = Literal["stop", "length", "abort", "error", "repetition"]
GroupKind = Literal["full", "window", "state", "cross"]

NO_TIMES: Mapping[str, float] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class GroupSpec:
    """One group of layers that share page tables.

    full: one page per `page_size` positions, kept until the request ends. window: the same, but pages whose positions
    have all left the last `window` positions are given back. state: exactly one page per request, which holds the
    recurrent state of all its layers; here `page_size` is the grid of positions at which prefix snapshots may be taken
    (that of the other groups), and a span that starts at 0 starts from the empty state whatever the page holds.
    cross: pages for encoder positions, fixed when the request starts.

    Page 0 of every group is the null page: it counts in `num_pages` but is never handed out.
    """

    kind: GroupKind
    page_size: int
    num_pages: int
    window: int | None = None


@dataclass(frozen=True, slots=True)
class Admission:
    """A request enters (or re-enters) the worker at row `slot`; it carries everything the worker must know."""

    slot: int
    request_id: str
    token_ids: tuple[int, ...]  # prompt followed by all tokens generated so far
    prompt_len: int
    params: SamplingParams | PoolingParams
    seed: int  # resolved: never None, so that a restart draws the same numbers
    adapter: int = 0  # device slot of the adapter; 0 is the bare model
    salt: bytes = b""  # requests with the same may know of each other's tokens


@dataclass(frozen=True, slots=True)
class PageGrant:
    """Pages appended to a row's table of one group: entries [index, index + len(pages)) of the table.

    A page id of 0 is the null page: never read, standing for positions that left the window.
    """

    slot: int
    group: int
    index: int
    pages: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PageCopy:
    """Copy one page's content before the step computes (state snapshots and their restoring).

    Copies of one plan are made in order, or all sources are read before any target is written.
    """

    group: int
    source: int
    target: int


class Span(NamedTuple):
    """Positions [start, start + count) of the request in row `slot`.

    The last len(drafts) of them hold proposed tokens. `sample` is true when the span reaches the end of the tokens
    known so far, so that a new token comes out of it. The token at `start` may still be on its way: then it is the one
    that the previous plan samples for this row.
    """

    slot: int
    start: int
    count: int  # type: ignore[assignment]  # hides the method of tuples, which nobody calls on a span
    sample: bool
    drafts: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What the workers do in one step, in this order: release, admit, grant, copy, compute spans, sample."""

    step: int
    released: tuple[int, ...] = ()
    admitted: tuple[Admission, ...] = ()
    grants: tuple[PageGrant, ...] = ()
    copies: tuple[PageCopy, ...] = ()
    spans: tuple[Span, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Positions computed by this step."""
        return sum(span.count for span in self.spans)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one position: the chosen token first, then the top ones, with ranks (1 is best)."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    ranks: tuple[int, ...]

    def with_named(self, named: TokenLogprobs) -> TokenLogprobs:
        """The same, and behind it the tokens that a request has named, which `named` has behind the chosen one."""
        return TokenLogprobs(
            self.token_ids + named.token_ids[1:], self.logprobs + named.logprobs[1:], self.ranks + named.ranks[1:]
        )


class SpanResult(NamedTuple):
    """What one span of the plan produced, in the plan's order.

    A span with drafts yields the accepted ones, in order, followed by one token of the model's own: 1 to
    len(drafts) + 1 tokens. Proposals in `drafts` follow the last of `tokens`; the scheduler may use fewer or none.
    """

    slot: int
    tokens: tuple[int, ...] = ()  # empty unless the span sampled; several when drafts were accepted
    logprobs: tuple[TokenLogprobs, ...] = ()  # one per token, when asked for
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()  # for positions start + 1 .. start + count of the prompt
    drafts: tuple[int, ...] = ()  # proposals for the next step
    pooled: tuple[float, ...] | None = None
    error: str | None = None  # this request failed; its neighbours did not


class Singles(Sequence[SpanResult]):
    """Results of spans that brought one token each and nothing else. A SpanResult is made where somebody looks at it."""

    __slots__ = ("tokens", "_spans")

    def __init__(self, spans: Sequence[Span], tokens: Sequence[int]) -> None:
        self.tokens = tokens
        self._spans = spans

    def __len__(self) -> int:
        """The number of spans."""
        return len(self.tokens)

    def __getitem__(self, index: int) -> SpanResult:  # type: ignore[override]  # nobody asks for a part of it
        """One result."""
        return SpanResult(self._spans[index].slot, (self.tokens[index],))


@dataclass(frozen=True, slots=True)
class StepResult:
    """The outcome of StepPlan number `step`, one entry per span in the same order."""

    step: int
    spans: Sequence[SpanResult]
    seconds: float = 0.0


class Event(NamedTuple):
    """What happened to one request in one step; EngineCore hands these to the Engine.

    `cached_tokens` and `preemptions` are told with the first token and with the end. Times are readings of the scheduler's
    clock in seconds; a request that never ran has no "scheduled".
    """

    request_id: str
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    pooled: tuple[float, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: str | None = None
    cached_tokens: int = 0
    preemptions: int = 0
    times: Mapping[str, float] = NO_TIMES  # with the first token and the end: arrival, scheduled, first_token, finished
