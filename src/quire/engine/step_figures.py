"""StepNotes: the figures of one step as they come about, for the observer. Knows completions and events, no core."""

from __future__ import annotations

from quire.core.plan import Event
from quire.engine.generation import Completion
from quire.engine.observe import FinishedRequest, StepFigures


class StepNotes:
    """Collects the figures of one step for the observer."""

    __slots__ = ("cached", "finished", "first", "generated", "later", "prompt")

    def __init__(self) -> None:
        self.prompt = 0
        self.cached = 0
        self.generated = 0
        self.first: list[float] = []
        self.later: dict[tuple[float, int], int] = {}  # (token before, tokens now) -> completions
        self.finished: list[FinishedRequest] = []

    def tokens(self, completion: Completion, event: Event, now: float) -> None:
        """Note tokens that came, before the completion takes them in."""
        self.generated += len(event.tokens)
        if completion.last_token:
            mates = (completion.last_token, len(event.tokens))  # nearly all completions of a step have the same
            self.later[mates] = self.later.get(mates, 0) + 1
            return
        self.first.append(now - completion.parent.arrival)
        self.prompt += len(completion.parent.prompt.token_ids)
        self.cached += event.cached_tokens

    def figures(self, now: float) -> StepFigures:
        """The figures of the step. Tokens of a completion that came together share the time since the one before."""
        between: dict[float, int] = {}
        for (since, tokens), completions in self.later.items():
            gap = (now - since) / tokens
            between[gap] = between.get(gap, 0) + tokens * completions
        return StepFigures(self.prompt, self.cached, self.generated, tuple(self.first), between, tuple(self.finished))


def finished(completion: Completion, now: float) -> FinishedRequest:
    """The figures of a completion that has ended."""
    parent = completion.parent
    first, last = completion.first_token, completion.last_token
    scheduled = parent.scheduled_ts
    return FinishedRequest(
        reason=completion.finish_reason or "stop",
        prompt_tokens=len(parent.prompt.token_ids),
        generation_tokens=len(completion.token_ids),
        cached_tokens=parent.cached_tokens,
        n=parent.params.n,
        max_tokens=parent.params.max_tokens,
        whole=now - parent.arrival,
        queued=max(0.0, scheduled - parent.arrival) if scheduled else 0.0,
        prefill=max(0.0, first - scheduled) if first and scheduled else 0.0,
        decode=last - first if first else 0.0,
    )
