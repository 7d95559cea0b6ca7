"""The guesses of a drafter that predicts from states, written down as they are made."""

from __future__ import annotations

import numpy as np
import pytest

from quire.worker.heads import NextLayerDrafter


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
