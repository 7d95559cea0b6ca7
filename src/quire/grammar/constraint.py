"""Constraint: the state of one output within its grammar, and the tokens that may follow.

Owned by whoever chooses the tokens. Knows token ids and bits; knows no tensors and no request.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from llguidance import LLMatcher
from numpy.typing import NDArray

from quire.errors import RequestFailedError

BITS = 32  # of one word of a mask


def mask_width(vocab_size: int) -> int:
    """Words of a mask with one bit for each token."""
    return -(-vocab_size // BITS)


class Constraint:
    """Follows one output. `end_ids` end it; they are allowed only where the output is complete."""

    __slots__ = ("_end_ids", "_matcher", "_past_end")

    def __init__(self, matcher: LLMatcher, end_ids: frozenset[int]) -> None:
        self._matcher = matcher
        self._end_ids = end_ids
        self._past_end = 0  # ends that were taken after the output was complete

    def advance(self, token_ids: Sequence[int]) -> int:
        """Take tokens in; how many of them the grammar allows. Those from the first wrong one on change nothing."""
        taken = self._matcher.try_consume_tokens(list(token_ids)) if not self.done else 0
        while taken < len(token_ids) and token_ids[taken] in self._end_ids and self.done:
            self._past_end += 1
            taken += 1
        return taken

    def rollback(self, count: int) -> None:
        """Forget the last `count` tokens that were taken in. RequestFailedError where that cannot be done."""
        back = min(count, self._past_end)
        self._past_end -= back
        if count > back and not self._matcher.rollback(count - back):
            raise RequestFailedError(f"the grammar cannot go back {count} tokens: {self._matcher.get_error()[:300]}")

    def fill_mask(self, row: NDArray[np.int32]) -> None:
        """Set the bits of the tokens that may come next, in `row` [mask_width(vocabulary)], and clear all others.

        RequestFailedError when the grammar needs more work for that than its limits allow.
        """
        if self.done:
            row.fill(0)
            bits = row.view(np.uint8)
            for token_id in self._end_ids:
                bits[token_id >> 3] |= 1 << (token_id & 7)
            return
        self._matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        if self._matcher.is_error():
            raise RequestFailedError(f"the grammar cannot go on: {self._matcher.get_error()[:300]}")

    @property
    def done(self) -> bool:
        """Whether the output is complete and only an end may follow."""
        return self._matcher.is_stopped() and not self._matcher.is_error()
