"""ModelDrafter: a small model guesses, a few tokens ahead for all rows at once.

Its keys and values lie in tensors of its own under the page numbers of the served model: what the scheduler gives a
request holds both. Positions beyond the granted pages use a few pages that belong to the row, and are computed again.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from quire.core.plan import GroupSpec
from quire.kernels.table import Ops
from quire.layers.batch import Batch, GroupInputs
from quire.models.served import ServedModel
from quire.worker.batch import Rows
from quire.worker.device import Device
from quire.worker.drafter import History, Seen
from quire.worker.kvstore import KVStore
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
        self._model = model
        self._history = history
        self._slots = slots
        self._sampler = sampler
        self._count = count
        self._longest = min(longest, slots.width - 1)  # positions
        self._max_tokens = max_tokens  # positions computed at once, at most
        self._device = device
        self._group = next(index for index, group in enumerate(slots.groups) if group.kind == "full")
        shared = slots.groups[self._group]
        self._size = shared.page_size
        self._own = -(-count // self._size)  # pages of a row's own
        self._first_own = shared.num_pages
        self._groups = 1 + max(layer.group for layer in model.layout.layers)
        pages = GroupSpec("full", self._size, shared.num_pages + self._own * slots.num_slots)
        self._caches: list[Any] = KVStore(model.layout, [pages] * self._groups, dtype, ops, device).caches
        # When a row was last asked about: its tokens then, the guesses, and the positions whose pages were granted.
        self._asked = np.zeros(slots.num_slots, dtype=np.int64)
        self._guesses = np.zeros((slots.num_slots, count), dtype=np.int64)
        self._kept = np.zeros(slots.num_slots, dtype=np.int64)

    def admit(self, slot: int) -> None:
        """Nothing is computed for the new request."""
        self._asked[slot] = self._kept[slot] = 0
        self._model.release(slot)

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
        tables = self._tables(slots, int(lengths.max()) + self._count)
        logits = self._catch_up(slots, lengths, tables)
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
                wanted = np.arange(len(slots))
                logits = self._model.forward(self._batch(slots, tables, tokens, ends, starts, ends + 1, wanted))
        found = self._device.to_host(torch.stack(guesses, dim=1)).numpy()
        self._asked[slots], self._guesses[slots] = lengths, found
        self._kept[slots] = self._slots.granted[self._group][slots] * self._size
        return found

    def _catch_up(self, slots: np.ndarray, lengths: np.ndarray, tables: torch.Tensor) -> torch.Tensor:
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
            picked = tables if last else tables[self._device.to_device(torch.from_numpy(now))]
            wanted = starts[1:] - 1 if last and len(now) == len(slots) else starts[:0]
            logits = self._model.forward(
                self._batch(
                    slots[now],
                    picked,
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

    def _tables(self, slots: np.ndarray, longest: int) -> torch.Tensor:
        """int32 [R, P]: the granted pages of each row, then its own."""
        rows = self._device.to_device(torch.from_numpy(slots))
        columns = torch.arange(-(-longest // self._size), device=rows.device)
        table = self._slots.tables[self._group].index_select(0, rows)[:, : len(columns)]
        granted = self._device.to_device(torch.from_numpy(self._slots.granted[self._group][slots]))[:, None]
        own = (columns - granted).clamp_(max=self._own - 1) + self._first_own + rows[:, None] * self._own
        if table.shape[1] < len(columns):
            table = torch.nn.functional.pad(table, (0, len(columns) - table.shape[1]))
        return torch.where(columns < granted, table, own).to(torch.int32)

    def _batch(
        self, slots: np.ndarray, tables: torch.Tensor, tokens: torch.Tensor, positions: np.ndarray,
        starts: np.ndarray, lengths: np.ndarray, wanted: np.ndarray,
    ) -> Batch:  # fmt: skip
        """A step of the draft model: `tokens` [T] at `positions` of the rows, logits for the `wanted` ones."""
        send = self._device.to_device
        where = send(torch.from_numpy(positions))
        row_of = send(torch.from_numpy(np.repeat(np.arange(len(slots)), np.diff(starts))))
        pages = tables[row_of, where // self._size].long()
        group = GroupInputs(self._size, tables, pages * self._size + where % self._size)
        return Batch(
            token_ids=tokens,
            positions=where,
            starts=send(torch.from_numpy(starts.astype(np.int32))),
            lengths=send(torch.from_numpy(lengths.astype(np.int32))),
            logit_rows=send(torch.from_numpy(wanted)),
            rows=send(torch.from_numpy(slots)),
            starts_host=starts.tolist(),
            lengths_host=lengths.tolist(),
            rows_host=slots.tolist(),
            groups=[group] * self._groups,
            caches=self._caches,
            prompt_lengths=send(torch.from_numpy(self._slots.prompt_lens[slots])),
        )
