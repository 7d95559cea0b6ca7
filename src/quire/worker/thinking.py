"""ThinkingBudget: the logit step that ends thoughts which have become too long.

Decides by the tokens in the Slots alone, so it is right after preemption, restarts and rejected drafts alike.
"""

from __future__ import annotations

import numpy as np
import torch

from quire.core.params import SamplingParams, ThinkingMarks
from quire.core.plan import Admission
from quire.errors import RequestFailedError
from quire.worker.batch import Rows
from quire.worker.device import Device
from quire.worker.slots import Slots

NEVER = float("-inf")
LAST_OF_PROMPT = 8  # tokens among which the mark stands that says that the prompt ends within a thought


class ThinkingBudget:
    """thinking_token_budget: after so many tokens of thoughts, only the mark that ends them may come."""

    def __init__(self, slots: Slots, device: Device) -> None:
        self._slots = slots
        self._budgets: dict[int, int] = {}
        self._marks: dict[int, ThinkingMarks] = {}
        self._inside: dict[int, bool] = {}  # whether the output begins with thoughts
        self._ended: dict[int, int] = {}  # where a closing mark ended, once one was seen

    def admit(self, new: Admission, params: SamplingParams) -> bool:
        """Keep what the row must not exceed."""
        if params.thinking_token_budget is None:
            return False
        if params.thinking is None:
            raise RequestFailedError("thinking_token_budget needs to know how the model marks its thoughts")
        self._budgets[new.slot], self._marks[new.slot] = params.thinking_token_budget, params.thinking
        tail = np.array(new.token_ids[max(0, new.prompt_len - LAST_OF_PROMPT) : new.prompt_len])
        opened = _last_end(tail, params.thinking.opener)
        closed = max(_last_end(tail, closer) for closer in params.thinking.closers)
        self._inside[new.slot] = params.thinking.implied or opened > closed
        self._ended.pop(new.slot, None)
        return True

    def apply(self, logits: torch.Tensor, using: list[int], rows: Rows) -> None:
        """Leave rows whose budget is used up the next token of the closing mark, unless something else forbids it."""
        for row in using:
            slot, end = int(rows.slots_host[row]), int(rows.positions_host[row])
            token = self._forced(slot, end)
            if token is not None and torch.isfinite(logits[row, token]):
                kept = logits[row, token].clone()
                logits[row].fill_(NEVER)
                logits[row, token] = kept

    def _forced(self, slot: int, end: int) -> int | None:
        """The token that must stand at position `end`, if any."""
        first = int(self._slots.prompt_lens[slot])
        budget, marks = self._budgets[slot], self._marks[slot]
        if end - first < budget or self._is_closed(slot, end):
            return None
        output = self._slots.tokens[slot, first:end].cpu().numpy()
        start = 0 if self._inside[slot] else _first_end(output, marks.opener)
        if start is None or len(output) - start < budget:
            return None
        for closer in marks.closers:
            at = _first_end(output[start:], closer)
            if at is not None:
                self._ended[slot] = first + start + at
                return None
        closer = marks.closers[0]
        said = next(
            count
            for count in range(len(closer) - 1, -1, -1)
            if count <= len(output) - start and tuple(output[len(output) - count :].tolist()) == closer[:count]
        )
        return closer[said]

    def _is_closed(self, slot: int, end: int) -> bool:
        """Whether the mark seen before is still there; a rejected draft may have brought it."""
        at = self._ended.get(slot)
        if at is None or at > end:
            return False
        return any(
            tuple(self._slots.tokens[slot, max(0, at - len(closer)) : at].tolist()) == closer
            for closer in self._marks[slot].closers
        )


def _ends(tokens: np.ndarray, mark: tuple[int, ...]) -> np.ndarray:
    """Where the mark ends, each time that it is in `tokens` [T]."""
    places = np.flatnonzero(tokens[: max(0, len(tokens) - len(mark) + 1)] == mark[0])
    for index, token in enumerate(mark[1:], start=1):
        places = places[tokens[places + index] == token]
    return places + len(mark)


def _first_end(tokens: np.ndarray, mark: tuple[int, ...]) -> int | None:
    found = _ends(tokens, mark)
    return int(found[0]) if found.size else None


def _last_end(tokens: np.ndarray, mark: tuple[int, ...]) -> int:
    found = _ends(tokens, mark)
    return int(found[-1]) if found.size else -1
