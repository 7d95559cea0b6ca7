"""StructuredOutputs: the logit step that forbids what the grammar of a row does not allow.

A row's constraint follows the tokens in the Slots, so it is right after retries, preemption and rejected drafts alike,
and nobody has to tell it what was chosen.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from quire.core.params import SamplingParams
from quire.core.plan import Admission
from quire.errors import RequestFailedError
from quire.grammar.compiler import Grammars
from quire.grammar.constraint import Constraint, mask_width
from quire.worker.batch import Rows
from quire.worker.device import Device
from quire.worker.slots import Slots

NEVER = float("-inf")


@dataclass(slots=True)
class _Followed:
    """One row: its constraint and the tokens that this has taken in."""

    constraint: Constraint
    first: int  # position of the first token of the output
    taken: list[int] = field(default_factory=list)


class StructuredOutputs:
    """structured_outputs: only tokens that keep the output within its grammar."""

    def __init__(self, slots: Slots, device: Device, grammars: Grammars | None) -> None:
        self._slots = slots
        self._device = device
        self._grammars = grammars
        self._rows: dict[int, _Followed] = {}

    def admit(self, new: Admission, params: SamplingParams) -> bool:
        """Start the row's constraint; tokens of an earlier run are taken in with the next mask."""
        self._rows.pop(new.slot, None)
        if params.structured_outputs is None:
            return False
        if self._grammars is None:
            raise RequestFailedError("structured_outputs needs a tokenizer, and this worker has none")
        self._rows[new.slot] = _Followed(self._grammars.constraint(params.structured_outputs), new.prompt_len)
        return True

    def apply(self, logits: torch.Tensor, using: list[int], rows: Rows) -> None:
        """Forbid the rest. A row whose grammar fails is left without any token, and Slots.errors says why."""
        mask = np.zeros((len(using), mask_width(logits.shape[1])), dtype=np.int32)
        last = self._last_tokens(using, rows)
        for index, row in enumerate(using):
            slot, end = int(rows.slots_host[row]), int(rows.positions_host[row])
            try:
                followed = self._rows[slot]
                self._follow(followed, slot, end, last[index])
                followed.constraint.fill_mask(mask[index])
            except Exception as error:  # whatever a grammar does, it must not reach the neighbours
                mask[index] = 0
                self._slots.errors[slot] = f"{type(error).__name__}: {error}"
        np.invert(mask, out=mask)
        bits = np.unpackbits(mask.view(np.uint8), axis=1, count=logits.shape[1], bitorder="little")
        forbidden = self._device.to_device(torch.from_numpy(bits.view(np.bool_)))
        if len(using) == logits.shape[0]:
            logits.masked_fill_(forbidden, NEVER)
        else:
            picked = self._device.to_device(torch.tensor(using, dtype=torch.int64))
            logits.index_copy_(0, picked, logits.index_select(0, picked).masked_fill_(forbidden, NEVER))

    def _last_tokens(self, using: list[int], rows: Rows) -> list[int]:
        """The token before each row's new one, all read at once."""
        index = np.array(using)
        places = rows.slots_host[index] * self._slots.width + rows.positions_host[index] - 1
        where = self._device.to_device(torch.from_numpy(places.astype(np.int64)))
        return self._device.to_host(self._slots.tokens.view(-1).index_select(0, where)).tolist()

    def _follow(self, followed: _Followed, slot: int, end: int, last: int) -> None:
        """Bring the constraint to the output that ends before position `end`."""
        count, taken = end - followed.first, followed.taken
        if len(taken) == count - 1:
            new = [last]
        elif len(taken) == count and (not count or taken[-1] == last):
            return
        else:
            output = self._slots.tokens[slot, followed.first : end].tolist()
            same = _common(taken, output)
            if same < len(taken):
                followed.constraint.rollback(len(taken) - same)
                del taken[same:]
            new = output[same:]
        if followed.constraint.advance(new) < len(new):
            raise RequestFailedError("the output has a token that its grammar does not allow")
        taken.extend(new)


def _common(one: list[int], other: list[int]) -> int:
    """How many tokens the two begin with in common."""
    count = 0
    for left, right in zip(one, other, strict=False):
        if left != right:
            break
        count += 1
    return count
