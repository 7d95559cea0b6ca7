"""A tiny paged loop: makes batches for a served model from token lists, with shuffled pages that start as NaN.

The probe proves a model with it, and tests drive models with it. It plans nothing: the caller says which sequence
computes how many positions in each step. It is not an engine.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import torch

from quire.kernels.table import Ops
from quire.layers.batch import Batch, GroupInputs
from quire.layers.spec import LayerSpec, ModelLayout
from quire.layers.state import copy_states, new_states
from quire.models.served import ServedModel


@dataclass(slots=True)
class Sequence:
    """One request of the loop: its tokens, how many are computed, and its pages per group."""

    slot: int
    tokens: list[int]
    prompt_length: int
    computed: int = 0
    pages: list[list[int]] = field(default_factory=list)


class PagedLoop:
    """Owns pages and caches for one model. Page 0 of each group stays unused."""

    def __init__(
        self,
        model: ServedModel,
        ops: Ops,
        page_size: int = 4,
        num_pages: int = 128,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> None:
        self.model = model
        self.page_size = page_size
        self.device = device
        self._layout = model.layout
        self._states = state_groups(model.layout)
        self._groups = max((layer.group for layer in model.layout.layers), default=0) + 1
        self._free = [list(range(1, num_pages)) for _ in range(self._groups)]
        for group, pages in enumerate(self._free):
            random.Random(group).shuffle(pages)
        self.caches: list[Any] = [self._new_cache(ops, layer, num_pages, dtype) for layer in model.layout.layers]

    def start(self, slot: int, tokens: list[int], prompt_length: int | None = None) -> Sequence:
        """A new sequence without pages."""
        sequence = Sequence(slot, list(tokens), len(tokens) if prompt_length is None else prompt_length)
        sequence.pages = [[] for _ in range(self._groups)]
        return sequence

    def adopt(self, sequence: Sequence, donor: Sequence, count: int) -> None:
        """A prefix hit: the first `count` positions, whole pages, come from the donor, its state by copy.

        The donor must have computed exactly `count` positions when the model keeps recurrent state.
        """
        assert count % self.page_size == 0 and sequence.computed == 0
        for group in range(self._groups):
            if group in self._states:
                page = self._take(group)
                for layer, cache in zip(self._layout.layers, self.caches, strict=True):
                    if layer.group == group:
                        copy_states(cache, [(donor.pages[group][0], page)])
                sequence.pages[group] = [page]
            else:
                sequence.pages[group] = donor.pages[group][: count // self.page_size]
        sequence.computed = count

    def preempt(self, sequence: Sequence, shared: int = 0) -> None:
        """Give all pages back (but the first `shared` ones of each group, which belong to others): start over."""
        for group, pages in enumerate(sequence.pages):
            self._free[group] = pages[shared if group not in self._states else 0 :] + self._free[group]
        sequence.pages = [[] for _ in range(self._groups)]
        sequence.computed = 0
        self.model.release(sequence.slot)

    def step(self, work: list[tuple[Sequence, int]], all_rows: bool = False) -> list[torch.Tensor]:
        """Compute the next positions of some sequences. Returns logits per sequence: of all its new rows, or the last."""
        for sequence, count in work:
            self._grow(sequence, sequence.computed + count)
        batch = self._batch(work, all_rows)
        logits = self.model.forward(batch).float()
        for sequence, count in work:
            sequence.computed += count
        return list(logits.split([count if all_rows else 1 for _, count in work]))

    def _batch(self, work: list[tuple[Sequence, int]], all_rows: bool) -> Batch:
        starts, lengths = [0], list[int]()
        tokens, positions = list[int](), list[int]()
        for sequence, count in work:
            span = range(sequence.computed, sequence.computed + count)
            tokens += [sequence.tokens[i] for i in span]
            positions += span
            starts.append(starts[-1] + count)
            lengths.append(sequence.computed + count)
        rows = range(starts[-1]) if all_rows else [start - 1 for start in starts[1:]]
        slots = [sequence.slot for sequence, _ in work]
        return Batch(
            token_ids=self._tensor(tokens),
            positions=self._tensor(positions),
            starts=self._tensor(starts, torch.int32),
            lengths=self._tensor(lengths, torch.int32),
            logit_rows=self._tensor(list(rows)),
            rows=self._tensor(slots),
            starts_host=starts,
            lengths_host=lengths,
            rows_host=slots,
            groups=[self._group_inputs(group, work) for group in range(self._groups)],
            caches=self.caches,
            prompt_lengths=self._tensor([sequence.prompt_length for sequence, _ in work]),
        )

    def _group_inputs(self, group: int, work: list[tuple[Sequence, int]]) -> GroupInputs:
        width = max(len(sequence.pages[group]) for sequence, _ in work)
        tables = [s.pages[group] + [0] * (width - len(s.pages[group])) for s, _ in work]
        slots: list[int] = []
        if group not in self._states:
            for sequence, count in work:
                for i in range(sequence.computed, sequence.computed + count):
                    slots.append(sequence.pages[group][i // self.page_size] * self.page_size + i % self.page_size)
        return GroupInputs(self.page_size, self._tensor(tables, torch.int32), self._tensor(slots))

    def _grow(self, sequence: Sequence, length: int) -> None:
        for group, pages in enumerate(sequence.pages):
            need = 1 if group in self._states else -(-length // self.page_size)
            while len(pages) < need:
                pages.append(self._take(group))

    def _take(self, group: int) -> int:
        return self._free[group].pop()

    def _new_cache(self, ops: Ops, layer: LayerSpec, num_pages: int, dtype: torch.dtype) -> Any:
        if layer.kind == "state":
            states = new_states(layer, num_pages, self.device)
            for state in states:
                state.fill_(float("nan"))
            return states
        if layer.shares is not None:
            return None
        size = (num_pages, self.page_size, layer.kv_heads, layer.key_dim, layer.value_dim)
        cache = ops.new_cache(*size, dtype, self.device, layer.shared)
        cache.data.view(torch.uint8).fill_(255)  # NaN, also as a scale of bytes
        return cache

    def _tensor(self, values: list[Any], dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)


def state_groups(layout: ModelLayout) -> set[int]:
    """The page-table groups that hold one page of recurrent state per request."""
    return {layer.group for layer in layout.layers if layer.kind == "state"}
