"""Forks: how the latest beams of searches stand in their forms, for those that go on from them with a token more.

Owned by who owns the rows of a step, and used by one thread. Knows forms and token ids; knows no request.
"""

from __future__ import annotations

from collections import OrderedDict

from quire.core.structured import StructuredOutputsParams
from quire.errors import RequestFailedError
from quire.grammar.compiler import Grammars
from quire.grammar.constraint import Constraint

MOST_KEPT = 256  # beams; one whose parent is gone is led to its place token by token


class Forks:
    """Constraints by form and output."""

    def __init__(self, grammars: Grammars) -> None:
        self._grammars = grammars
        self._kept: OrderedDict[tuple[StructuredOutputsParams, tuple[int, ...]], Constraint] = OrderedDict()

    def behind(self, form: StructuredOutputsParams, output: tuple[int, ...]) -> Constraint:
        """A constraint that has taken in the output. Raises RequestFailedError for one that the form does not allow."""
        parent = self._kept.get((form, output[:-1])) if output else None
        made = self._grammars.constraint(form) if parent is None else parent.fork()
        rest = output if parent is None else output[-1:]
        if made.advance(rest) < len(rest):
            raise RequestFailedError("a beam has a token that its grammar does not allow")
        self._kept[form, output] = made.fork()
        self._kept.move_to_end((form, output))
        while len(self._kept) > MOST_KEPT:
            self._kept.popitem(last=False)
        return made
