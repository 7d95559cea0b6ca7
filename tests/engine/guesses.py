"""For tests of drafters: histories to guess from, and guesses that are written down as they are made."""

from __future__ import annotations

import numpy as np
import pytest

from quire import SamplingParams
from quire.core.plan import Admission
from quire.worker.drafter import History
from quire.worker.heads import NextLayerDrafter


def history_of(*rows: list[int], width: int = 80) -> History:
    """A history with these rows."""
    history = History(len(rows), width)
    history.tokens[:] = 7  # what lies behind a row's end must not count
    for slot, tokens in enumerate(rows):
        history.admit(Admission(slot, str(slot), tuple(tokens), 1, SamplingParams(), 0))
    return history


def noted_guesses(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[int], tuple[int, ...]]]:
    """From now on: each text, as tokens, and what was guessed to come behind it."""
    made: list[tuple[list[int], tuple[int, ...]]] = []
    propose = NextLayerDrafter.propose

    def noting(self: NextLayerDrafter, slots: np.ndarray) -> list[tuple[int, ...]]:
        found = propose(self, slots)
        for slot, guess in zip(slots.tolist(), found, strict=True):
            made.append((self._history.tokens[slot, : self._history.lengths[slot]].tolist(), guess))
        return found

    monkeypatch.setattr(NextLayerDrafter, "propose", noting)
    return made
