"""PastOutputs: what ended requests have said, kept apart by their salts, and where a text goes on as one of them did.

A salt stands for whoever may share cached pages (a tenant, a model, an adapter): nobody is guessed for from what another
one was told. Knows tokens only.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

GRAM = 4  # tokens that a place is found by
KEPT = 1 << 13  # tokens of a salt; the older half goes when there are more
SALTS = 32  # the least recently used goes


class Said:
    """The outputs of one salt, one behind the other."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._places: dict[tuple[int, ...], int] = {}  # each run of GRAM tokens -> what came behind its latest one
        self._entered = 0  # tokens whose runs are there: the others are entered when somebody asks

    def add(self, output: Sequence[int]) -> None:
        """Take in an output that has ended."""
        self.tokens.extend(output)
        self.tokens.append(-1)
        if len(self.tokens) > KEPT:
            self.tokens = self.tokens[-KEPT // 2 :]
            self._places.clear()
            self._entered = 0

    def find(self, text: Sequence[int], longest: int) -> tuple[int, int]:
        """The place behind the latest run that `text` ends with, and how many tokens before it match; (0, 0) for none."""
        for end in range(max(self._entered, GRAM), len(self.tokens)):
            self._places[tuple(self.tokens[end - GRAM : end])] = end
        self._entered = len(self.tokens)
        place = self._places.get(tuple(text[-GRAM:]), 0)
        if not place:
            return 0, 0
        matched, most = GRAM, min(longest, len(text), place)
        while matched < most and self.tokens[place - 1 - matched] == text[-1 - matched]:
            matched += 1
        return place, matched

    def after(self, place: int, count: int) -> tuple[int, ...]:
        """What came there, `count` tokens at most, up to the output's end."""
        found = self.tokens[place : place + count]
        return tuple(found[: found.index(-1)] if -1 in found else found)


class PastOutputs:
    """Said of each salt, of those that were used last."""

    def __init__(self) -> None:
        self._salts: OrderedDict[bytes, Said] = OrderedDict()

    def of(self, salt: bytes) -> Said:
        """What was said under this salt so far."""
        if salt not in self._salts and len(self._salts) == SALTS:
            self._salts.popitem(last=False)
        said = self._salts.setdefault(salt, Said())
        self._salts.move_to_end(salt)
        return said
