"""What a step program is, whichever backend makes it: a model's forward, recorded once and run without its Python.

It names the two roles, recorder and program, and the one error. How a backend does it is its own affair; how a model
uses it is in models/programs/recorded.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch


class NotRecordableError(Exception):
    """A forward cannot be made a program; the message says why, in words for the log."""


@dataclass(slots=True)
class Take:
    """One run of a forward that is recorded.

    `run()` computes and returns one tensor from `inputs`, which are contiguous. `sizes` are the numbers that change from
    step to step, all different and above 1, the first of them the largest number of rows. `step` is what `run` hands
    down to `opaque` functions, which get `real_step` in its place.
    """

    run: Callable[[], torch.Tensor]
    inputs: dict[str, torch.Tensor]
    sizes: tuple[int, ...]
    step: Any = None
    real_step: Any = None


@dataclass(slots=True)
class Opaque:
    """A function that stays as it is: `holder[name]` while recording is replaced, `function(step, ...)` called instead."""

    holder: dict[str, Any]
    name: str
    function: Callable[..., Any]


def without_step(function: Callable[..., Any]) -> Callable[..., Any]:
    """An opaque function from one that does not want the step."""
    return lambda step, *args, **kwargs: function(*args, **kwargs)


class Program(Protocol):
    """A recorded forward. One thread at a time may run it. It keeps what it read from the model alive."""

    def run(self, inputs: Sequence[torch.Tensor], sizes: Sequence[int], highest: int, step: Any = None) -> torch.Tensor:
        """The tensor of one step, new in each.

        `inputs` and `sizes` come in the order of the takes, inputs contiguous; positions are below `highest`.
        """
        ...

    def memory(self, rows: int) -> int:
        """Bytes that a step of `rows` rows works in; kept for the steps after it."""
        ...

    def spoil(self, rows: int) -> None:
        """Fill the memory that a step of `rows` rows works in with NaN, to see that nothing is read before it is there."""
        ...

    def describe(self) -> str:
        """How many calls it makes, for the log."""
        ...

    def text(self) -> str | None:
        """All that it does, the same for the same program in any process; None where it calls functions without a name."""
        ...


class Recorder(Protocol):
    """Makes programs for one backend."""

    def program(self, takes: tuple[Take, Take], opaque: Sequence[Opaque] = ()) -> Program:
        """Run both takes and make a program of what they have in common. Raises NotRecordableError.

        An input named "positions" says the position of each row; what follows from it alone is computed once for many.
        """
        ...
