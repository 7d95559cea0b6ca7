"""Slots: one stable row per live request: its tokens and its page tables.

Only the Runner writes here, following the plan. Tokens live on the device, so that a step can read what the step before it
chose without anybody waiting; what the plan brings (page tables, lengths of prompts, who wants what) stays on the host.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from quire.core.params import SamplingParams
from quire.core.plan import Admission, GroupSpec, PageGrant, Span
from quire.worker.device import Device


class Slots:
    """Rows 0 .. num_slots - 1. A row is free, or holds one request from its admission to its release."""

    def __init__(self, num_slots: int, max_model_len: int, groups: Sequence[GroupSpec], device: Device) -> None:
        where = device.torch_device
        self._device = device
        self.num_slots = num_slots
        self.width = max_model_len + 1  # the last token of a full request is stored although it is never computed
        self.groups = tuple(groups)
        # Left as it comes: a position is written before any span reads it.
        self.tokens = torch.empty(num_slots, self.width, dtype=torch.int32, device=where)
        self.tables = [np.zeros((num_slots, table_width(group, max_model_len)), dtype=np.int32) for group in groups]
        self.granted = [np.zeros(num_slots, dtype=np.int64) for _ in groups]  # entries of each row's table
        self.prompt_lens = np.zeros(num_slots, dtype=np.int64)
        self.request_ids: list[str] = [""] * num_slots
        self.prompt_logprobs: dict[int, int] = {}  # rows that want them for the prompt, and how many
        self.errors: dict[int, str] = {}  # rows whose admission failed, with the reason

    def admit(self, new: Admission) -> None:
        """Put a request into its row. Tables are filled by the grants that follow."""
        tokens = torch.tensor(new.token_ids, dtype=torch.int32)
        self.tokens[new.slot, : len(new.token_ids)] = self._device.to_device(tokens)
        self.prompt_lens[new.slot] = new.prompt_len
        for granted in self.granted:
            granted[new.slot] = 0
        self.request_ids[new.slot] = new.request_id
        if isinstance(new.params, SamplingParams) and new.params.prompt_report is not None:
            self.prompt_logprobs[new.slot] = new.params.prompt_report

    def release(self, slot: int) -> None:
        """Free a row."""
        self.request_ids[slot] = ""
        self.prompt_logprobs.pop(slot, None)
        self.errors.pop(slot, None)

    def grant(self, grants: Sequence[PageGrant]) -> None:
        """Enter pages into the tables."""
        for item in grants:
            end = item.index + len(item.pages)
            self.tables[item.group][item.slot, item.index : end] = item.pages
            self.granted[item.group][item.slot] = end

    def guess(self, spans: Sequence[Span]) -> None:
        """Write the drafts of the spans into their rows. A rejected one lies behind the row's end, where none reads."""
        places: list[int] = []
        tokens: list[int] = []
        for span in spans:
            if span.drafts:
                end = span.slot * self.width + span.start + span.count
                places.extend(range(end - len(span.drafts), end))
                tokens.extend(span.drafts)
        if places:
            where = self._device.to_device(torch.tensor(places, dtype=torch.int64))
            values = self._device.to_device(torch.tensor(tokens, dtype=torch.int32))
            self.tokens.view(-1).index_copy_(0, where, values)

    def store(self, slots: torch.Tensor, positions: torch.Tensor, tokens: torch.Tensor) -> None:
        """Write chosen tokens, all int64 [R]: row, position, token."""
        self.tokens.view(-1).index_copy_(0, slots * self.width + positions, tokens.to(torch.int32))


def table_width(group: GroupSpec, max_model_len: int) -> int:
    """Entries of one request's table."""
    return 1 if group.kind == "state" else -(-max_model_len // group.page_size)
