"""DraftPages: keys and values of a drafter's own layers, and the steps that it computes with them.

They lie in tensors of their own under the page numbers of the served model: what the scheduler gives a request holds both,
and what it has copied is copied in both. A page may have been filled while nobody drafted: how far each one holds the
drafter's keys is remembered. Positions beyond the granted pages use a few pages of the row's own, and are computed again.
All that is known on the host, so a step costs a few look-ups there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from quire.core.plan import GroupSpec, PageCopy, StepPlan
from quire.kernels.table import Ops
from quire.layers.batch import Batch, GroupInputs
from quire.layers.spec import ModelLayout
from quire.worker.device import Device
from quire.worker.kvstore import KVStore
from quire.worker.slots import Slots, table_width


class DraftPages:
    """Pages for `ahead` positions behind those granted to a row."""

    def __init__(
        self, layout: ModelLayout, slots: Slots, ahead: int, dtype: torch.dtype, ops: Ops, device: Device
    ) -> None:
        self._slots = slots
        self._device = device
        self._group = next(index for index, group in enumerate(slots.groups) if group.kind == "full")
        shared = slots.groups[self._group]
        self.size = shared.page_size
        self._own = -(-ahead // self.size)  # pages of a row's own
        self._first_own = shared.num_pages
        self.groups = 1 + max(layer.group for layer in layout.layers)
        self.num_pages = shared.num_pages + self._own * slots.num_slots
        pages = GroupSpec("full", self.size, self.num_pages)
        self._store = KVStore(layout, [pages] * self.groups, dtype, ops, device)
        self.caches: list[Any] = self._store.caches
        # Of each row: the pages granted to it, and its own ones behind them.
        width = table_width(shared, slots.width) + self._own
        self._table = np.zeros((slots.num_slots, width), dtype=np.int32)
        self._filled = np.zeros(shared.num_pages, dtype=np.int32)  # positions of each page, from its first one on

    def begin(self, plan: StepPlan) -> None:
        """Follow what a plan does with pages, before its step is computed."""
        starts = {span.slot: span.start for span in plan.spans} if plan.grants else {}
        for grant in plan.grants:
            if grant.group == self._group:
                row, end = self._table[grant.slot], grant.index + len(grant.pages)
                first = self._first_own + grant.slot * self._own
                row[grant.index : end] = grant.pages
                row[end : end + self._own] = range(first, first + self._own)
                fresh = max(starts.get(grant.slot, 0) // self.size, grant.index)  # before it: what others computed
                self._filled[row[fresh:end]] = 0

    def copy(self, copies: Sequence[PageCopy]) -> None:
        """Do what a plan does with the served model's pages, behind begin()."""
        mine = [item for item in copies if item.group == self._group]
        if mine:
            self._store.copy(
                [PageCopy(group, item.source, item.target) for group in range(self.groups) for item in mine]
            )
            for item in mine:
                self._filled[item.target] = self._filled[item.source]

    def note(self, slots: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> None:
        """The positions [start, end) of rows, at least one each, were computed behind those there, int64 [R] each."""
        last = (ends - 1) // self.size
        self._filled[self._table[slots, last]] = ends - last * self.size
        for row in np.flatnonzero(starts // self.size < last).tolist():
            self._filled[self._table[slots[row], starts[row] // self.size : last[row]]] = self.size

    def filled(self, slot: int, end: int) -> bool:
        """Whether the pages of a row hold the drafter's keys of all positions before `end`."""
        pages = self._table[slot, : -(-end // self.size)]
        needed = np.minimum(end - self.size * np.arange(len(pages)), self.size)
        return bool((self._filled[pages] >= needed).all())

    def granted(self, slots: np.ndarray) -> np.ndarray:
        """int64 [R]: positions for which the rows have pages of the scheduler's."""
        return self._slots.granted[self._group][slots] * self.size

    def batch(
        self, slots: np.ndarray, tokens: torch.Tensor, positions: np.ndarray, starts: np.ndarray, lengths: np.ndarray,
        wanted: np.ndarray, firsts: np.ndarray | None = None,
    ) -> Batch:  # fmt: skip
        """A step: `tokens` [T] at `positions` of the rows, of which `starts` [R + 1] says where each begins and
        `lengths` [R] how many positions it has then; logits for the `wanted` ones.

        Rows see nothing of their pages before the positions `firsts` [R], where a page begins.
        """
        row_of = np.repeat(slots, np.diff(starts))
        places = self._table[row_of, positions // self.size].astype(np.int64) * self.size + positions % self.size
        seen = lengths if firsts is None else lengths - firsts
        columns = np.arange(-(-int(seen.max()) // self.size))
        if firsts is None or not firsts.any():
            pages = self._table[:, : len(columns)].take(slots, axis=0)
        else:
            skipped = np.minimum(columns + (firsts // self.size)[:, None], self._table.shape[1] - 1)
            pages = np.take_along_axis(self._table[slots], skipped, axis=1)
        group = GroupInputs(self.size, self._send(pages), self._send(places))
        return Batch(
            token_ids=tokens,
            positions=self._send(positions),
            starts=self._send(starts.astype(np.int32)),
            lengths=self._send(seen.astype(np.int32)),
            logit_rows=self._send(wanted),
            rows=self._send(slots),
            starts_host=starts.tolist(),
            lengths_host=lengths.tolist(),
            rows_host=slots.tolist(),
            groups=[group] * self.groups,
            caches=self.caches,
            prompt_lengths=self._send(self._slots.prompt_lens[slots]),
        )

    def _send(self, values: np.ndarray) -> torch.Tensor:
        return self._device.to_device(torch.from_numpy(values))
