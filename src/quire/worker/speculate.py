"""Speculator: asks the drafter for guesses after each step, for the rows that can use them, while that pays.

The scheduler turns the guesses into the next step's drafts, the sampler verifies them. Nothing here decides a token.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import numpy as np

from quire.core.params import SamplingParams
from quire.core.plan import Admission, Span, SpanResult
from quire.worker.drafter import Drafter, History
from quire.worker.governor import Governor

logger = logging.getLogger(__name__)


class Speculator:
    """Keeps the History. Without a governor, drafts are made whether they pay or not."""

    def __init__(self, history: History, drafter: Drafter, governor: Governor | None) -> None:
        self._history = history
        self._drafter = drafter
        self._governor = governor
        self._able = np.zeros(len(history.lengths), dtype=bool)

    def admit(self, new: Admission) -> None:
        """Take in a request. One whose output must keep to a grammar gets no drafts: most would break it."""
        params = new.params
        able = isinstance(params, SamplingParams) and params.structured_outputs is None and params.max_tokens != 1
        self._able[new.slot] = able
        self._history.admit(new)
        self._drafter.admit(new.slot)

    def propose(self, spans: Sequence[Span], results: tuple[SpanResult, ...], began: float) -> tuple[SpanResult, ...]:
        """The results with guesses for the next step. `began` is when the step did, by time.perf_counter()."""
        rows, tokens, up_to_date = [], 0, True
        for index, (span, result) in enumerate(zip(spans, results, strict=True)):
            known = 1 + len(span.drafts)
            up_to_date &= span.sample and span.count == known
            if result.tokens:
                self._history.extend(span.slot, span.start + span.count - len(span.drafts), result.tokens)
                tokens += len(result.tokens)
                if self._able[span.slot]:
                    rows.append(index)
        governor = self._governor
        found = results
        if rows and (governor is None or governor.wanted(len(spans))):
            guesses = self._guess([spans[index].slot for index in rows])
            changed = list(results)
            for index, guess in zip(rows, guesses, strict=False):
                changed[index] = results[index]._replace(drafts=guess)
            found = tuple(changed)
        if governor is not None and up_to_date and tokens:
            governor.note(len(spans), tokens, time.perf_counter() - began)
        return found

    def _guess(self, slots: list[int]) -> list[tuple[int, ...]]:
        """What the drafter says. One that fails is not worth a request: there are no drafts then."""
        try:
            return self._drafter.propose(np.array(slots, dtype=np.int64))
        except Exception:
            logger.exception("no drafts for this step")
            return []
