"""What happens to logits before a token is chosen, as a list of steps: LOGIT_STEPS in its order, then Penalties.

A step knows the rows that use it and costs nothing for the others. A new wish about logits is one more class in the
list. Rows are independent: what a step does to one row is a function of that row alone.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch

from quire.core.params import SamplingParams
from quire.core.plan import Admission
from quire.kernels.choosing import Said
from quire.kernels.table import Ops
from quire.worker.batch import Rows
from quire.worker.device import Device
from quire.worker.slots import Slots

NEVER = float("-inf")


class LogitStep(Protocol):
    """One thing that may be done to logits."""

    def admit(self, new: Admission, params: SamplingParams) -> bool:
        """Take note of a request that enters row new.slot. True when it uses this step."""
        ...

    def apply(self, logits: torch.Tensor, using: list[int], rows: Rows) -> None:
        """Change the float32 `logits` [R, V] in place, in the rows `using` only (indices into `rows`)."""
        ...


class AllowedTokens:
    """allowed_token_ids: every other token is forbidden."""

    def __init__(self, slots: Slots, device: Device) -> None:
        self._device = device
        self._ids: dict[int, torch.Tensor] = {}

    def admit(self, new: Admission, params: SamplingParams) -> bool:
        """Keep the ids of the row."""
        if params.allowed_token_ids is None:
            return False
        self._ids[new.slot] = _ids(params.allowed_token_ids, self._device)
        return True

    def apply(self, logits: torch.Tensor, using: list[int], rows: Rows) -> None:
        """Forbid the rest."""
        for row in using:
            ids = self._ids[int(rows.slots_host[row])]
            kept = logits[row].index_select(0, ids)
            logits[row].fill_(NEVER)
            logits[row].index_copy_(0, ids, kept)


class BadWords:
    """bad_words: the last token of a sequence is forbidden where the output ends with the ones before it."""

    def __init__(self, slots: Slots, device: Device) -> None:
        self._slots = slots
        self._words: dict[int, tuple[tuple[int, ...], ...]] = {}

    def admit(self, new: Admission, params: SamplingParams) -> bool:
        """Keep the sequences of the row."""
        if not params.bad_words_token_ids:
            return False
        self._words[new.slot] = params.bad_words_token_ids
        return True

    def apply(self, logits: torch.Tensor, using: list[int], rows: Rows) -> None:
        """Forbid the tokens that would complete a sequence."""
        for row in using:
            slot, end = int(rows.slots_host[row]), int(rows.positions_host[row])
            words = self._words[slot]
            longest = max(len(word) for word in words) - 1
            first = max(int(self._slots.prompt_lens[slot]), end - longest)
            tail = tuple(self._slots.tokens[slot, first:end].tolist()) if first < end else ()
            # An empty beginning matches at every place.
            forbidden = [word[-1] for word in words if tail[len(tail) - len(word) + 1 :] == word[:-1]]
            logits[row, forbidden] = NEVER


class MinTokens:
    """min_tokens: nothing that ends the request, before it is long enough."""

    def __init__(self, slots: Slots, device: Device) -> None:
        self._device = device
        self._ids: dict[int, torch.Tensor] = {}
        self._until: dict[int, int] = {}  # first position that may hold an end
        self._may_be_complete: dict[int, bool] = {}  # rows with a grammar, which may leave nothing but an end

    def admit(self, new: Admission, params: SamplingParams) -> bool:
        """Keep the row's ends, whatever ignore_eos says of them."""
        ends = params.all_stop_token_ids
        if not params.min_tokens or not ends:
            return False
        self._ids[new.slot] = _ids(tuple(sorted(ends)), self._device)
        self._until[new.slot] = new.prompt_len + params.min_tokens
        self._may_be_complete[new.slot] = params.structured_outputs is not None
        return True

    def apply(self, logits: torch.Tensor, using: list[int], rows: Rows) -> None:
        """Forbid the ends in rows that are too short."""
        for row in using:
            slot = int(rows.slots_host[row])
            if rows.positions_host[row] < self._until[slot]:
                before = logits[row].clone() if self._may_be_complete[slot] else None
                logits[row].index_fill_(0, self._ids[slot], NEVER)
                if before is not None and not torch.isfinite(logits[row].amax()):
                    logits[row] = before


class LogitBias:
    """logit_bias: added as it is."""

    def __init__(self, slots: Slots, device: Device) -> None:
        self._device = device
        self._bias: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def admit(self, new: Admission, params: SamplingParams) -> bool:
        """Keep ids and values of the row."""
        if not params.logit_bias:
            return False
        ids = _ids(tuple(token for token, _ in params.logit_bias), self._device)
        values = torch.tensor([value for _, value in params.logit_bias], dtype=torch.float32)
        self._bias[new.slot] = (ids, self._device.to_device(values))
        return True

    def apply(self, logits: torch.Tensor, using: list[int], rows: Rows) -> None:
        """Add the biases; the ids of a row are distinct."""
        for row in using:
            ids, values = self._bias[int(rows.slots_host[row])]
            logits[row].index_add_(0, ids, values)


class Penalties:
    """repetition_penalty over prompt and output, presence_penalty and frequency_penalty over the output alone.

    Counted anew from the rows' tokens in each step, so there is no count to keep true through preemption or restart.
    """

    def __init__(self, slots: Slots, ops: Ops) -> None:
        self._slots = slots
        self._ops = ops
        self._repetition = np.ones(slots.num_slots, dtype=np.float32)
        self._presence = np.zeros(slots.num_slots, dtype=np.float32)
        self._frequency = np.zeros(slots.num_slots, dtype=np.float32)

    def admit(self, new: Admission, params: SamplingParams) -> bool:
        """Keep the penalties of the row."""
        self._repetition[new.slot] = params.repetition_penalty
        self._presence[new.slot] = params.presence_penalty
        self._frequency[new.slot] = params.frequency_penalty
        return params.repetition_penalty != 1.0 or bool(params.presence_penalty or params.frequency_penalty)

    def apply(self, logits: torch.Tensor, using: list[int], rows: Rows) -> None:
        """Lower what has been said before."""
        index = np.array(using, dtype=np.int64)
        slots = rows.slots_host[index].astype(np.int64)
        ends = rows.positions_host[index].astype(np.int64)
        firsts = np.minimum(self._slots.prompt_lens[slots], ends).astype(np.int64)
        parts = (index, slots, firsts, ends, self._repetition[slots], self._presence[slots], self._frequency[slots])
        self._ops.penalize(logits, self._slots.tokens, Said(*(torch.from_numpy(part) for part in parts)))


LOGIT_STEPS = (AllowedTokens, BadWords, MinTokens, LogitBias)  # and then Penalties, which need ops


def _ids(ids: tuple[int, ...], device: Device) -> torch.Tensor:
    return device.to_device(torch.tensor(ids, dtype=torch.int64))
