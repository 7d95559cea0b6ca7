"""ModelDrafter: a small model guesses, a few tokens ahead for all rows at once.

It reads what the row's text has become since it was last asked, in one step, and then goes on by itself.
"""

from __future__ import annotations

import numpy as np
import torch

from quire.core.plan import Admission, StepPlan
from quire.kernels.table import Ops
from quire.models.programs.recorded import Plan, with_program
from quire.models.served import ServedModel
from quire.worker.batch import Rows
from quire.worker.device import Device
from quire.worker.draft_pages import DraftPages
from quire.worker.drafter import History, Seen
from quire.worker.sampler import Sampler
from quire.worker.slots import Slots


class ModelDrafter:
    """Catches up with the tokens of the rows that it is asked about, then goes on `count` tokens on its own.

    How far its keys and values are right is remembered per row, so it may be left alone for any number of steps.
    """

    def __init__(
        self, model: ServedModel, history: History, slots: Slots, sampler: Sampler, count: int, longest: int,
        dtype: torch.dtype, max_tokens: int, ops: Ops, device: Device,
    ) -> None:  # fmt: skip
        self._history = history
        self._slots = slots
        self._sampler = sampler
        self._count = count
        self._longest = min(longest, slots.width - 1)  # positions
        self._max_tokens = max_tokens  # positions computed at once, at most
        self._device = device
        self._pages = pages = DraftPages(model.layout, slots, count, dtype, ops, device)
        self._model = with_program(model, Plan([pages.size] * pages.groups, pages.num_pages, pages.caches), ops)
        # When a row was last asked about: its tokens then, the guesses, and the positions whose pages were granted.
        self._asked = np.zeros(slots.num_slots, dtype=np.int64)
        self._guesses = np.zeros((slots.num_slots, count), dtype=np.int64)
        self._kept = np.zeros(slots.num_slots, dtype=np.int64)

    def admit(self, new: Admission) -> None:
        """Nothing is computed for the new request."""
        self._asked[new.slot] = self._kept[new.slot] = 0
        self._model.release(new.slot)

    def release(self, slot: int) -> None:
        """Nothing is kept of a request that has left."""

    def begin(self, plan: StepPlan) -> None:
        """Pages are followed; what they hold is computed anew where it is not this row's own, so copies are not."""
        self._pages.begin(plan)

    def follow(self, seen: Seen) -> None:
        """Hidden states mean nothing here."""

    def propose(self, slots: np.ndarray) -> list[tuple[int, ...]]:
        """Guesses for the rows, none for those at the end of the context."""
        able = np.flatnonzero(self._history.lengths[slots] + self._count <= self._longest)
        found: list[tuple[int, ...]] = [()] * len(slots)
        if able.size:
            guesses = self._guess(slots[able])
            for row, guess in zip(able.tolist(), guesses.tolist(), strict=True):
                found[row] = tuple(guess)
        return found

    def _guess(self, slots: np.ndarray) -> np.ndarray:
        """int64 [R, count]."""
        lengths = self._history.lengths[slots]
        logits = self._catch_up(slots, lengths)
        rows = self._device.to_device(torch.from_numpy(slots))
        guesses = []
        for ahead in range(self._count):
            ends = lengths + ahead
            positions = self._device.to_device(torch.from_numpy(ends))
            # Drawn as the served model will draw, with the same numbers: that is how the two agree most often.
            tokens = self._sampler.draw(logits, Rows([], None, slots, ends, rows, positions))
            guesses.append(tokens)
            if ahead + 1 < self._count:
                starts = np.arange(len(slots) + 1)
                logits = self._model.forward(self._pages.batch(slots, tokens, ends, starts, ends + 1, starts[:-1]))
        found = self._device.to_host(torch.stack(guesses, dim=1)).numpy()
        self._asked[slots], self._guesses[slots] = lengths, found
        self._kept[slots] = self._pages.granted(slots)
        return found

    def _catch_up(self, slots: np.ndarray, lengths: np.ndarray) -> torch.Tensor:
        """Compute the tokens that came since; the logits [R, V] behind each row's last."""
        begins = self._right(slots, lengths)
        while True:
            counts = lengths - begins
            before = np.cumsum(counts) - counts
            takes = np.clip(self._max_tokens - before, 0, counts)
            last = bool((takes == counts).all())
            now = np.flatnonzero(takes)
            starts = np.concatenate([[0], np.cumsum(takes[now])])
            positions = np.arange(starts[-1]) + np.repeat(begins[now] - starts[:-1], takes[now])
            tokens = self._history.tokens[np.repeat(slots[now], takes[now]), positions].astype(np.int64)
            wanted = starts[1:] - 1 if last and len(now) == len(slots) else starts[:0]
            logits = self._model.forward(
                self._pages.batch(
                    slots[now],
                    self._device.to_device(torch.from_numpy(tokens)),
                    positions,
                    starts,
                    begins[now] + takes[now],
                    wanted,
                )
            )
            if last:
                return logits
            # Each row keeps a token for the last round, which is to bring logits for all of them.
            begins = np.minimum(begins + takes, lengths - 1)

    def _right(self, slots: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """int64 [R]: positions computed before whose tokens have turned out as guessed and whose pages have stayed."""
        asked = self._asked[slots]
        ahead = asked[:, None] + np.arange(self._count - 1)
        said = self._history.tokens[slots[:, None], np.minimum(ahead, self._slots.width - 1)]
        same = (said == self._guesses[slots, : self._count - 1]) & (ahead < lengths[:, None])
        agreed = np.where(asked > 0, np.logical_and.accumulate(same, axis=1).sum(axis=1), 0)
        return np.minimum(np.minimum(asked + agreed, self._kept[slots]), lengths - 1)
