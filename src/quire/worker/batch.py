"""Gathers the tensors of one step from the spans of its plan.

Positions and pages are known on the host, token values only on the device: all but the tokens is computed with numpy, whose
operations on a few rows take a third of a tensor's. No loop over positions, however many rows there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from quire.core.plan import Span
from quire.layers.batch import Batch, GroupInputs
from quire.worker.device import Device
from quire.worker.slots import Slots


@dataclass(slots=True)
class PromptRows:
    """Rows of the logits [first, first + count) that speak of the prompt tokens after position `start` of a span."""

    span: int  # index in the step
    slot: int
    start: int
    first: int
    count: int


@dataclass(slots=True)
class Rows:
    """The rows of the logits from which tokens are chosen; R of them.

    `positions` are those of the tokens to be chosen. The host arrays hold the same as the tensors. A span with drafts
    has a row for each of them and one more, in order: what the model says in the draft's place, and behind the last.
    """

    spans: list[int]  # index in the step of each row's span
    logit_rows: list[int] | None  # rows within the logits; None when they are all of them, in order
    slots_host: np.ndarray  # int64 [R]
    positions_host: np.ndarray  # int64 [R]
    slots: torch.Tensor  # int64 [R]
    positions: torch.Tensor  # int64 [R]
    one_each: bool = False  # one row for each span, in order


@dataclass(slots=True)
class Step:
    """A gathered step: the batch for the model, and what its logits are for."""

    batch: Batch
    rows: Rows
    prompts: list[PromptRows]


def gather(spans: Sequence[Span], slots: Slots, caches: list[Any], device: Device) -> Step:
    """The tensors for computing `spans`, in their order."""
    columns = list(zip(*spans, strict=True))  # the fields of all spans
    rows, firsts, counts = (np.array(column, dtype=np.int64) for column in columns[:3])
    starts = np.zeros(len(spans) + 1, dtype=np.int64)
    np.cumsum(counts, out=starts[1:])
    lengths = firsts + counts
    total = int(starts[-1])
    if total == len(spans):
        positions, row_of = firsts, rows
    else:
        positions = np.arange(total) + np.repeat(firsts - starts[:-1], counts)
        row_of = np.repeat(rows, counts)
    wanted = _wanted_rows(spans, slots, starts, all(columns[3]), any(columns[4]))
    device_rows = _put(rows, device)
    batch = Batch(
        token_ids=slots.tokens.view(-1).index_select(0, _put(row_of * slots.width + positions, device)).long(),
        positions=_put(positions, device),
        starts=_put(starts.astype(np.int32), device),
        lengths=_put(lengths.astype(np.int32), device),
        logit_rows=_put(wanted.logit_rows, device),
        rows=device_rows,
        starts_host=starts.tolist(),
        lengths_host=lengths.tolist(),
        rows_host=rows.tolist(),
        groups=_groups(slots, rows, row_of, positions, int(lengths.max()), device),
        caches=caches,
        prompt_lengths=_put(slots.prompt_lens[rows], device),
    )
    chosen = wanted.sampled
    everyone = len(chosen) == len(spans) and not wanted.drafts
    picked_rows = rows if everyone else rows[chosen]
    if wanted.drafts:
        picked_positions = positions[wanted.logit_rows[wanted.within]] + 1
    else:
        picked_positions = lengths if everyone else lengths[chosen]
    return Step(
        batch,
        Rows(
            chosen,
            wanted.within if wanted.prompts else None,
            picked_rows,
            picked_positions,
            device_rows if everyone else _put(picked_rows, device),
            _put(picked_positions, device),
            everyone,
        ),
        wanted.prompts,
    )


@dataclass(slots=True)
class _Wanted:
    """Which rows of the step need logits, and what for."""

    logit_rows: np.ndarray  # int64 [R], rows of the step
    sampled: list[int]  # the span of each token to be chosen
    within: list[int]  # where their logits lie among logit_rows
    prompts: list[PromptRows]
    drafts: bool  # whether a span chooses several


def _wanted_rows(spans: Sequence[Span], slots: Slots, starts: np.ndarray, everyone: bool, drafts: bool) -> _Wanted:
    """`everyone`: every span chooses a token; `drafts`: some have drafts."""
    sampled = list(range(len(spans))) if everyone else [index for index, span in enumerate(spans) if span.sample]
    asking = slots.prompt_logprobs
    if not drafts and not (asking and any(span.slot in asking and _prompt_rows(span, slots) > 0 for span in spans)):
        ends = starts[1:] - 1
        return _Wanted(ends if len(sampled) == len(spans) else ends[sampled], sampled, [], [], drafts=False)
    pieces: list[np.ndarray] = []
    sampled = []
    within: list[int] = []
    prompts: list[PromptRows] = []
    found = 0
    for index, span in enumerate(spans):
        count = _prompt_rows(span, slots) if span.slot in asking else 0
        first = int(starts[index])
        if count > 0:
            pieces.append(np.arange(first, first + count))
            prompts.append(PromptRows(index, span.slot, span.start, found, count))
            found += count
        if span.sample:
            # The rows that predict tokens after those known are never the prompt's own.
            count, end = 1 + len(span.drafts), int(starts[index + 1])
            pieces.append(np.arange(end - count, end))
            within.extend(range(found, found + count))
            sampled.extend([index] * count)
            found += count
    return _Wanted(np.concatenate(pieces), sampled, within, prompts, drafts)


def _prompt_rows(span: Span, slots: Slots) -> int:
    """How many rows of a span predict another token of the prompt; can be negative behind the prompt."""
    return min(span.count, int(slots.prompt_lens[span.slot]) - 1 - span.start)


def _groups(
    slots: Slots, rows: np.ndarray, row_of: np.ndarray, positions: np.ndarray, longest: int, device: Device
) -> list[GroupInputs]:
    """`rows`: the slot of each sequence; `row_of`: of each position; `longest`: positions of the longest sequence."""
    found = []
    for group, table in zip(slots.groups, slots.tables, strict=True):
        if group.kind == "state":
            size, used, places = 1, 1, table[row_of, 0].astype(np.int64)
        else:
            size, used = group.page_size, -(-longest // group.page_size)
            pages, within = np.divmod(positions, size)
            places = table[row_of, pages].astype(np.int64) * size + within
        tables = table[:, :used].take(rows, axis=0)
        found.append(GroupInputs(size, _put(tables, device), _put(places, device)))
    return found


def _put(array: np.ndarray, device: Device) -> torch.Tensor:
    return device.to_device(torch.from_numpy(array))
