"""What the engine tells whoever counts: figures of a step and of each finished request.

Plain data; the engine calls an Observer after every step and knows nothing of metrics.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from quire.core.plan import FinishReason
from quire.core.stats import Stats


@dataclass(frozen=True, slots=True)
class FinishedRequest:
    """One completion that ended. Times are in seconds; a part that was never reached is 0.0."""

    reason: FinishReason
    prompt_tokens: int
    generation_tokens: int
    cached_tokens: int
    n: int  # completions asked for by the request that this one belongs to
    max_tokens: int | None
    whole: float  # arrival to last token
    queued: float  # arrival to first scheduled
    prefill: float  # scheduled to first token
    decode: float  # first token to last token


@dataclass(frozen=True, slots=True)
class StepFigures:
    """What one Engine.step brought."""

    prompt_tokens: int  # of the requests whose first token came in this step
    cached_tokens: int  # of those, taken from the prefix cache
    generation_tokens: int
    first_token_seconds: tuple[float, ...]  # arrival to first token, one per request that got its first
    between_seconds: Mapping[float, int]  # since the previous token, for how many tokens; all but the first ones
    finished: tuple[FinishedRequest, ...]


class Observer(Protocol):
    """Called in the engine's thread after each step; must be quick."""

    def observe(self, stats: Stats, figures: StepFigures) -> None:
        """Take note of the scheduler's state and of the step."""
        ...
