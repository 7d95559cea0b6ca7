"""Speculator: asks the drafter for guesses after each step, for the rows that can use them, while that pays.

The scheduler turns the guesses into the next step's drafts, the sampler verifies them. Nothing here decides a token.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from quire.core.params import SamplingParams
from quire.core.plan import Admission, Singles, Span, SpanResult, StepPlan
from quire.models.speculation.open_model import KeepsStates
from quire.worker.drafter import Drafter, History, Seen
from quire.worker.governor import Governor

logger = logging.getLogger(__name__)


class Speculator:
    """Keeps the History. Without a governor, drafts are made whether they pay or not.

    `model` is the served model where it keeps the hidden states that the drafter goes on from.
    """

    def __init__(
        self, history: History, drafter: Drafter, governor: Governor | None, model: KeepsStates | None = None
    ) -> None:
        self._history = history
        self._drafter = drafter
        self._governor = governor
        self._model = model
        self._able = [False] * len(history.lengths)
        self._ended = 0.0  # when the last step did
        self._steady = 0  # its rows, if all of them were up to date

    def admit(self, new: Admission) -> None:
        """Take in a request."""
        params = new.params
        if isinstance(params, SamplingParams):  # one whose next token is its last needs no guess
            self._able[new.slot] = new.prompt_len + (params.max_tokens or 0) != len(new.token_ids) + 1
        else:
            self._able[new.slot] = False
        self._history.admit(new)
        self._drafter.admit(new)

    def release(self, slot: int) -> None:
        """A request has left."""
        self._drafter.release(slot)

    def begin(self, plan: StepPlan) -> None:
        """Follow what a plan does with pages, before its step is computed."""
        self._drafter.begin(plan)

    def propose(self, spans: Sequence[Span], results: Sequence[SpanResult], began: float) -> Sequence[SpanResult]:
        """The results with guesses for the next step. `began` is when the step did, by time.perf_counter()."""
        told = self._extend(spans, results)
        governor, found = self._governor, results
        if self._model is not None:
            self._follow(spans, results, self._model)
        blind = False
        if governor is None or governor.wanted(len(spans)):
            able = [index for index, span in enumerate(spans) if told.tokens[index] and self._able[span.slot]]
            found = self._with_guesses(spans, results, able)
            # Where the states of most rows are yet to be seen, there is nothing to judge.
            blind = self._model is not None and 2 * sum(bool(one.drafts) for one in found) < len(able)
        if governor is not None:
            self._note(governor, told, began, blind)
            if self._model is not None:
                self._model.open = governor.open()
        return found

    def _note(self, governor: Governor, told: _Told, began: float, blind: bool) -> None:
        """Tell how long the step took: from the end of the one before it where nothing lay between, since drafts make
        work outside of the worker, too."""
        now, slots = time.perf_counter(), told.slots
        if told.up_to_date and all(told.tokens):
            seconds = now - (self._ended if self._steady == len(slots) else began)
            governor.note(slots, told.tokens, seconds, blind)
        self._ended, self._steady = now, len(slots) if told.up_to_date else 0

    def _follow(self, spans: Sequence[Span], results: Sequence[SpanResult], model: KeepsStates) -> None:
        """Show the drafter the states of a step, if they are of all its spans: after a failure they are not."""
        hidden, model.hidden = model.hidden, None
        if hidden is None or len(hidden) != sum(span.count for span in spans):
            return
        try:
            self._drafter.follow(Seen.of(spans, results, hidden))
        except Exception:
            logger.exception("no drafts go on from this step")

    def _extend(self, spans: Sequence[Span], results: Sequence[SpanResult]) -> _Told:
        """Add what the step brought to the history."""
        history, slots = self._history, [span.slot for span in spans]
        if isinstance(results, Singles) and all(span.count == 1 for span in spans):
            history.append(slots, [span.start + 1 for span in spans], results.tokens)  # the common case, in one go
            return _Told(slots, [1] * len(spans), True)
        for span, result in zip(spans, results, strict=True):
            if result.tokens:
                history.extend(span.slot, span.start + span.count - len(span.drafts), result.tokens)
        up_to_date = all(span.sample and span.count == 1 + len(span.drafts) for span in spans)
        return _Told(slots, [len(result.tokens) for result in results], up_to_date)

    def _with_guesses(
        self, spans: Sequence[Span], results: Sequence[SpanResult], able: list[int]
    ) -> Sequence[SpanResult]:
        """The results, those with index `able` with what the drafter says. One that fails is not worth a request."""
        if not able:
            return results
        slots = [spans[index].slot for index in able]
        try:
            guesses = self._drafter.propose(np.array(slots, dtype=np.int64))
        except Exception:
            logger.exception("no drafts for this step")
            return results
        if not any(guesses):
            return results
        changed = list(results)
        for index, guess in zip(able, guesses, strict=True):
            if guess:
                changed[index] = results[index]._replace(drafts=guess)
        return tuple(changed)


@dataclass(slots=True)
class _Told:
    """What a step brought."""

    slots: list[int]  # of the spans
    tokens: list[int]  # how many each of them brought
    up_to_date: bool  # every span reached the end of what was known, and computed nothing else
