"""When a request ends by its tokens: end-of-sequence, stop ids, length, repetition, in that order.

Stop strings belong to the text side. Nothing here knows the scheduler.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quire.core.params import PoolingParams, RepetitionDetection, SamplingParams
from quire.core.plan import FinishReason


@dataclass(frozen=True, slots=True)
class Stop:
    """Why a request ended. `token` is the stop id that did it; the model's own end-of-sequence is not reported."""

    reason: FinishReason
    token: int | None = None


@dataclass(frozen=True, slots=True)
class StopRules:
    """The stop rules of one request. `limit` counts all its tokens, the prompt included."""

    prompt_len: int
    limit: int
    min_tokens: int = 0
    eos: int | None = None
    ids: frozenset[int] = frozenset()  # further ids, reported as the stop reason
    repetition: RepetitionDetection | None = None

    @property
    def watched(self) -> frozenset[int]:
        """All ids that may end the request."""
        return self.ids if self.eos is None else self.ids | {self.eos}


STOPPED = Stop("stop")
LENGTH = Stop("length")
REPETITION = Stop("repetition")


def stop_rules(params: SamplingParams | PoolingParams, prompt_len: int, max_model_len: int) -> StopRules:
    """The rules that follow from the parameters. ignore_eos silences all end-of-sequence ids, not the user's own."""
    if isinstance(params, PoolingParams):
        return StopRules(prompt_len, limit=prompt_len + 1)
    limit = max_model_len
    if params.max_tokens is not None:
        limit = min(limit, prompt_len + params.max_tokens)
    eos = params.eos_token_ids if not params.ignore_eos else ()
    return StopRules(
        prompt_len,
        limit,
        # With a grammar the sampler alone keeps to min_tokens: a complete output ends, however short it is.
        min_tokens=params.min_tokens if params.structured_outputs is None else 0,
        eos=eos[0] if eos else None,
        ids=frozenset(params.stop_token_ids).union(eos[1:]),
        repetition=params.repetition_detection,
    )


def check_stop(tokens: Sequence[int], rules: StopRules) -> Stop | None:
    """Judge the last of `tokens` (prompt and output). None: go on."""
    generated = len(tokens) - rules.prompt_len
    if generated <= 0:
        return None
    last = tokens[-1]
    mature = generated >= rules.min_tokens
    if mature and last == rules.eos:
        return STOPPED
    if mature and last in rules.ids:
        return Stop("stop", last)
    if len(tokens) >= rules.limit:
        return LENGTH
    if mature and rules.repetition is not None and repeats(tokens, rules.prompt_len, rules.repetition):
        return REPETITION
    return None


def repeats(tokens: Sequence[int], prompt_len: int, rule: RepetitionDetection) -> bool:
    """True when the output ends with one pattern, of an allowed size, at least rule.min_count times in a row."""
    length = len(tokens)
    for size in range(rule.min_pattern_size, rule.max_pattern_size + 1):
        first = length - size * rule.min_count
        if first < prompt_len:
            return False
        # A stretch that equals itself moved by `size` is one pattern of that size again and again.
        if all(tokens[index] == tokens[index - size] for index in range(length - 1, first + size - 1, -1)):
            return True
    return False
