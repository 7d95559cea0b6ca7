"""Governor: whether drafting pays, found out by trying both ways while the engine runs.

What counts is tokens per second of the steps themselves, for each size of batch: acceptance, the drafter's own cost and
the price of a wider step are all in it. It decides about speed alone, since drafts never change what is said.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median

TRIAL = 12  # steps of a way, after the first, that decide about it
FIRST_WAIT = 64  # steps until the losing way is tried again; doubled each time it loses again
LONGEST_WAIT = 4096


@dataclass(slots=True)
class _Ways:
    """Both ways for one size of batch."""

    drafting: bool = True
    steps: int = 0  # with the present way
    limit: int = TRIAL  # after which the other one is tried
    wait: int = FIRST_WAIT
    trial: bool = True  # the present way is on trial
    rates: dict[bool, float] = field(default_factory=dict)  # tokens per second
    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)


class Governor:
    """wanted() before each step, note() after it."""

    def __init__(self) -> None:
        self._sizes: dict[int, _Ways] = {}

    def wanted(self, rows: int) -> bool:
        """Whether drafts should be made for a step of so many rows."""
        return self._ways(rows).drafting

    def note(self, rows: int, tokens: int, seconds: float) -> None:
        """A step of `rows` rows, each of which was up to date, brought `tokens` tokens in `seconds`."""
        ways = self._ways(rows)
        ways.steps += 1
        if ways.steps > 1:  # the first step after a change still does what was prepared the other way
            ways.seconds = [*ways.seconds[1 - TRIAL :], seconds]
            ways.tokens = [*ways.tokens[1 - TRIAL :], tokens]
        if ways.steps > ways.limit:
            self._judge(ways)

    def _judge(self, ways: _Ways) -> None:
        """The way's time is up: take the better one, or try the other."""
        # Other programs make single steps slow; the median does not mind.
        ways.rates[ways.drafting] = sum(ways.tokens) / len(ways.tokens) / max(median(ways.seconds), 1e-9)
        other = ways.rates.get(not ways.drafting)
        if other is None or not ways.trial:
            self._turn(ways, not ways.drafting, TRIAL, trial=True)
        elif ways.rates[ways.drafting] > other:
            ways.wait = FIRST_WAIT
            self._turn(ways, ways.drafting, ways.wait, trial=False)
        else:
            self._turn(ways, not ways.drafting, ways.wait, trial=False)
            ways.wait = min(2 * ways.wait, LONGEST_WAIT)

    def _turn(self, ways: _Ways, drafting: bool, limit: int, trial: bool) -> None:
        ways.drafting, ways.limit, ways.trial = drafting, limit, trial
        ways.steps = 0
        ways.seconds, ways.tokens = [], []

    def _ways(self, rows: int) -> _Ways:
        """Batches between two powers of two are alike."""
        return self._sizes.setdefault(rows.bit_length(), _Ways())
