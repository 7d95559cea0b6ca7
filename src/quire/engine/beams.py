"""Beam search: which continuations of a prompt go on, which have ended, and when none can get better any more.

Speaks of tokens and log-probabilities alone; the caller has each beam's next token scored, in whatever way. The rules
are those of Transformers' beam search.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal

from quire.core.checks import finite_number, token_ids
from quire.core.params import form_of, suggesting
from quire.core.structured import StructuredOutputsParams
from quire.engine.logprobs import Logprob
from quire.errors import ValidationError

Scores = Mapping[int, Logprob]  # of the likeliest tokens at a position, the likeliest first


@suggesting
@dataclass(frozen=True, slots=True, kw_only=True)
class BeamSearchParams:
    """How to search. Results are ranked by cumulative log-probability / (generated tokens ** length_penalty).

    `early_stopping`: True ends the search with beam_width results; False when the best running beam, as long as it is,
    beats none of them; "never" when even the best that it could become does not. The model's own log-probabilities
    count; `temperature` is there for those who give it, and changes no ranking. `logprobs`: how many of the likeliest
    tokens are told of at each position, beside the one that a sequence has; -1 for all. `structured_outputs`: the form
    that every sequence keeps; of the tokens that it forbids nothing is said, and the log-probabilities of the others stay
    as they are.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()  # that end a sequence, beside the model's own
    temperature: float = 0.0
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    include_stop_str_in_output: bool = False  # whether the token that ends a sequence is part of it
    skip_special_tokens: bool = True
    logprobs: int | None = None
    structured_outputs: StructuredOutputsParams | None = None

    def __post_init__(self) -> None:
        """Raise ValidationError for a search that finds nothing."""
        for name in ("beam_width", "max_tokens"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValidationError(f"{name} must be a whole number of at least 1, found {value!r}", name)
        if self.logprobs is not None and (not isinstance(self.logprobs, int) or self.logprobs < -1):
            raise ValidationError(
                f"logprobs must be a number of tokens, or -1 for all, found {self.logprobs!r}", "logprobs"
            )
        finite_number("length_penalty", self.length_penalty, -100.0, 100.0)
        object.__setattr__(self, "stop_token_ids", token_ids("stop_token_ids", self.stop_token_ids))
        if self.early_stopping not in (True, False, "never"):
            raise ValidationError('early_stopping must be true, false or "never"', "early_stopping")
        object.__setattr__(self, "structured_outputs", form_of(self.structured_outputs))


@dataclass(slots=True)
class BeamSearchSequence:
    """One result. `tokens` begin with the prompt; `text` is that of all of them, prompt included."""

    tokens: list[int]
    cum_logprob: float
    score: float  # what results are ranked by
    finish_reason: Literal["stop", "length"]
    stop_reason: int | None = None  # the token that ended it
    text: str | None = None
    logprobs: list[dict[int, Logprob]] | None = None  # of each token behind the prompt and of the one that ended it


@dataclass(slots=True)
class BeamSearchOutput:
    """The results for one prompt, the best first."""

    sequences: list[BeamSearchSequence]


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A beam with one more token."""

    beam: int
    token: int
    cum_logprob: float


@dataclass(slots=True)
class _Beam:
    """A sequence that may go on. `logprobs` stays empty where nobody asks."""

    tokens: list[int]
    cum_logprob: float
    logprobs: list[dict[int, Logprob]]


@dataclass(slots=True)
class BeamSearch:
    """The search over one prompt: score what is in `running`, then advance(), until `running` is empty."""

    prompt: Sequence[int]
    params: BeamSearchParams
    ends: frozenset[int]  # tokens that end a sequence; none to go on past them
    limit: int  # tokens to generate, at most
    running: list[_Beam] = field(init=False)
    _done: list[BeamSearchSequence] = field(default_factory=list)
    _steps: int = 0

    def __post_init__(self) -> None:
        """One beam to begin with."""
        self.running = [_Beam(list(self.prompt), 0.0, [])]

    def advance(self, scored: Sequence[Scores]) -> None:
        """Go on by a token. `scored` are the best tokens of each running beam."""
        width = self.params.beam_width
        candidates = [
            _Candidate(index, token, beam.cum_logprob + found.logprob)
            for index, (beam, best) in enumerate(zip(self.running, scored, strict=True))
            for token, found in best.items()
        ]
        candidates.sort(key=lambda item: (-item.cum_logprob, item.beam, item.token))
        self._steps += 1
        last = self._steps >= self.limit
        for candidate in candidates[:width]:  # an end that is not among the best is no result
            if last or candidate.token in self.ends:
                self._finish(candidate, self._told(candidate, scored))
        self._done.sort(key=lambda sequence: -sequence.score)
        del self._done[width:]
        going = [] if last else [item for item in candidates if item.token not in self.ends][:width]
        self.running = [
            _Beam([*self.running[item.beam].tokens, item.token], item.cum_logprob, self._told(item, scored))
            for item in going
        ]
        if len(self._done) == width and not self._can_improve():
            self.running = []

    def sequences(self) -> list[BeamSearchSequence]:
        """What was found, the best first."""
        return self._done

    def _told(self, candidate: _Candidate, scored: Sequence[Scores]) -> list[dict[int, Logprob]]:
        """What is said of the tokens of a beam with one more."""
        most, best = self.params.logprobs, scored[candidate.beam]
        if most is None:
            return []
        likeliest = best.items() if most < 0 else islice(best.items(), most)
        entry = {candidate.token: best[candidate.token]} | dict(likeliest)
        return [*self.running[candidate.beam].logprobs, entry]

    def _finish(self, candidate: _Candidate, told: list[dict[int, Logprob]]) -> None:
        tokens = self.running[candidate.beam].tokens
        ended = candidate.token in self.ends
        self._done.append(
            BeamSearchSequence(
                tokens=[*tokens]
                if ended and not self.params.include_stop_str_in_output
                else [*tokens, candidate.token],
                cum_logprob=candidate.cum_logprob,
                score=self._score(candidate.cum_logprob),
                finish_reason="stop" if ended else "length",
                stop_reason=candidate.token if ended else None,
                logprobs=None if self.params.logprobs is None else told,
            )
        )

    def _score(self, cum_logprob: float) -> float:
        """By the tokens generated so far, the one that ends a sequence included."""
        return self._ranked(cum_logprob, self._steps)

    def _ranked(self, cum_logprob: float, length: int) -> float:
        return cum_logprob / length**self.params.length_penalty

    def _can_improve(self) -> bool:
        """Whether the best running beam beats the worst result: as long as it is now, or as long as it could become."""
        early = self.params.early_stopping
        if early is True or not self.running:
            return False
        length = self.limit if early == "never" and self.params.length_penalty > 0 else self._steps
        return self._ranked(self.running[0].cum_logprob, length) > self._done[-1].score
