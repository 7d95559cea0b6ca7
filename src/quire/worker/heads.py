"""Drafters that go on from the served model's own last hidden states: Medusa heads, and a further layer (EAGLE, MTP).

States are there only of steps that were computed while somebody wanted them. A row that was left alone for a while is
drafted for again all the same: at once by Medusa heads, from its next page on by a layer.
"""

from __future__ import annotations

import numpy as np
import torch

from quire.core.plan import Admission, StepPlan
from quire.kernels.table import Ops
from quire.layers.batch import Batch
from quire.models.programs.recorded import Plan, with_program
from quire.models.speculation.medusa import MedusaHeads
from quire.models.speculation.nextlayer import Head
from quire.worker.batch import Rows
from quire.worker.device import Device
from quire.worker.draft_pages import DraftPages
from quire.worker.drafter import History, Seen
from quire.worker.sampler import Sampler
from quire.worker.slots import Slots


class MedusaDrafter:
    """Each head guesses one token, all from the state behind the row's last computed position."""

    def __init__(
        self, heads: MedusaHeads, history: History, sampler: Sampler, size: int, count: int, dtype: torch.dtype,
        device: Device,
    ) -> None:  # fmt: skip
        rows = len(history.lengths)
        self._heads = heads
        self._history = history
        self._sampler = sampler
        self._count = min(count, heads.count)
        self._device = device
        self._states = torch.zeros(rows, size, dtype=dtype, device=device.torch_device)
        self._ends = np.zeros(rows, dtype=np.int64)  # positions computed when the state was taken

    def admit(self, new: Admission) -> None:
        """No state is known of the new request."""
        self._ends[new.slot] = 0

    def release(self, slot: int) -> None:
        """Nothing is kept of a request that has left."""

    def begin(self, plan: StepPlan) -> None:
        """No pages are used."""

    def follow(self, seen: Seen) -> None:
        """Keep the last state of each row."""
        rows = self._device.to_device(torch.from_numpy(seen.firsts + seen.counts - 1))
        slots = self._device.to_device(torch.from_numpy(seen.slots))
        self._states.index_copy_(0, slots, seen.hidden.index_select(0, rows).to(self._states.dtype))
        self._ends[seen.slots] = seen.starts + seen.counts

    def propose(self, slots: np.ndarray) -> list[tuple[int, ...]]:
        """Guesses for the rows whose last state is known."""
        able = np.flatnonzero(self._ends[slots] == self._history.lengths[slots] - 1)
        found: list[tuple[int, ...]] = [()] * len(slots)
        if not able.size:
            return found
        picked = slots[able]
        rows = self._device.to_device(torch.from_numpy(picked))
        states = self._states.index_select(0, rows)
        columns = []
        for head in range(self._count):
            ends = self._history.lengths[picked] + head
            positions = self._device.to_device(torch.from_numpy(ends))
            logits = self._heads.forward(states, head)
            columns.append(self._sampler.draw(logits, Rows([], None, picked, ends, rows, positions)))
        guesses = self._device.to_host(torch.stack(columns, dim=1)).tolist()
        for row, guess in zip(able.tolist(), guesses, strict=True):
            found[row] = tuple(guess)
        return found


class NextLayerDrafter:
    """The layer reads each position's state beside the token behind it, then its own guesses beside its own states."""

    def __init__(
        self, layer: Head, history: History, slots: Slots, sampler: Sampler, count: int, longest: int,
        dtype: torch.dtype, cache_dtype: torch.dtype, ops: Ops, device: Device,
    ) -> None:  # fmt: skip
        self._layer = layer
        self._history = history
        self._sampler = sampler
        self._count = count
        self._longest = min(longest, slots.width - 1)
        self._device = device
        self._pages = pages = DraftPages(layer.layout, slots, count, cache_dtype, ops, device)
        rows, size = slots.num_slots, layer.layout.hidden_size
        self._states = torch.zeros(rows, size, dtype=dtype, device=device.torch_device)
        self._scored = torch.zeros_like(self._states)
        sizes = [pages.size] * pages.groups
        self._steps = with_program(layer, Plan(sizes, pages.num_pages, pages.caches, self._states[0]), ops)
        # Of each row, the positions whose keys and values are there: from the beginning of a page up to an end.
        self._firsts = np.zeros(rows, dtype=np.int64)
        self._ends = np.zeros(rows, dtype=np.int64)

    def admit(self, new: Admission) -> None:
        """Nothing is there of the new request but what its shared pages hold."""
        self._firsts[new.slot] = self._ends[new.slot] = 0

    def release(self, slot: int) -> None:
        """Nothing is kept of a request that has left."""

    def begin(self, plan: StepPlan) -> None:
        """What happens to the served model's pages happens to the layer's."""
        self._pages.begin(plan)
        self._pages.copy(plan.copies)

    def follow(self, seen: Seen) -> None:
        """Compute the layer at the positions of the step, but for those before a row's first one."""
        begins, ends = np.maximum(seen.starts, self._from(seen)), seen.starts + seen.counts
        rows = np.flatnonzero(begins < ends)
        if not rows.size:
            return
        slots, begins, ends = seen.slots[rows], begins[rows], ends[rows]
        counts = ends - begins
        starts = np.concatenate([[0], np.cumsum(counts)])
        offsets = np.arange(starts[-1]) - np.repeat(starts[:-1], counts)
        positions = offsets + np.repeat(begins, counts)
        tokens = self._history.tokens[np.repeat(slots, counts), positions + 1].astype(np.int64)
        computed = seen.firsts[rows] + begins - seen.starts[rows]
        hidden = seen.hidden.index_select(0, self._send(offsets + np.repeat(computed, counts)))
        batch = self._pages.batch(
            slots, self._send(tokens), positions, starts, ends, starts[1:] - 1, self._firsts[slots]
        )
        batch.states = self._layer.take(hidden)
        states, scored = self._step(batch)
        where = self._send(slots)
        self._states.index_copy_(0, where, states)
        self._scored.index_copy_(0, where, scored)
        self._ends[slots] = ends
        self._pages.note(slots, begins, ends)

    def _from(self, seen: Seen) -> np.ndarray:
        """int64 [R]: the first position of each row. With keys missing before the step, none before its next page are
        looked at; the layer's keys follow from the states alone, so those that it has are right whatever is missing."""
        for row in np.flatnonzero(seen.starts > self._ends[seen.slots]).tolist():
            slot, start = int(seen.slots[row]), int(seen.starts[row])
            whole = self._pages.filled(slot, start)
            self._firsts[slot] = 0 if whole else -(-start // self._pages.size) * self._pages.size
        return self._firsts[seen.slots]

    def propose(self, slots: np.ndarray) -> list[tuple[int, ...]]:
        """Guesses for the rows that have keys up to here, none at the end of the context."""
        lengths = self._history.lengths[slots]
        able = np.flatnonzero((self._ends[slots] == lengths - 1) & (lengths + self._count <= self._longest))
        found: list[tuple[int, ...]] = [()] * len(slots)
        if able.size:
            for row, guess in zip(able.tolist(), self._guess(slots[able]).tolist(), strict=True):
                found[row] = tuple(guess)
        return found

    def _guess(self, slots: np.ndarray) -> np.ndarray:
        """int64 [R, count]."""
        lengths, firsts = self._history.lengths[slots], self._firsts[slots]
        rows = self._send(slots)
        states, scored = self._states.index_select(0, rows), self._scored.index_select(0, rows)
        starts = np.arange(len(slots) + 1)
        guesses = []
        for ahead in range(self._count):
            ends = lengths + ahead
            # Drawn as the served model will draw, with the same numbers: that is how the two agree most often.
            tokens = self._sampler.draw(self._layer.score(scored), Rows([], None, slots, ends, rows, self._send(ends)))
            guesses.append(tokens)
            if ahead + 1 < self._count:
                batch = self._pages.batch(slots, tokens, ends - 1, starts, ends, starts[:-1], firsts)
                batch.states = states
                states, scored = self._step(batch)
        return self._device.to_host(torch.stack(guesses, dim=1)).numpy()

    def _step(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """What the next position reads and what is scored, [R, size] each."""
        found, size = self._steps.forward(batch), self._states.shape[1]
        return found[:, :size], found[:, -size:]

    def _send(self, values: np.ndarray) -> torch.Tensor:
        return self._device.to_device(torch.from_numpy(values))
