"""Governor: whether drafting pays, found out by trying both ways while the engine runs.

What counts is tokens per second of the steps themselves, for each size of batch: acceptance, the drafter's own cost and
the price of a wider step are all in it. It decides about speed alone, since drafts never change what is said.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import fmean

TRIAL = 8  # steps of a way, after the first, that decide about it
EARLY = 3  # steps that are enough where the other way is much better
MUCH = 1.2
# Drafting is to bring this many times the tokens at least: over a few steps less is luck, and rows that no guess is right
# for wait longer for their steps, so that a batch may end later although it made more tokens at first.
GAIN = 1.1
COST = 0.01  # share of the time that trying the losing way may take
LEAST_WAIT = 64  # steps between two trials
MOST_WAIT = 16384


@dataclass(slots=True)
class _Ways:
    """Both ways for one size of batch. The plain one comes first: knowing it costs nothing."""

    drafting: bool = False
    steps: int = 0  # with the present way
    limit: int = EARLY  # after which the other one is tried
    trial: bool = True  # the present way is on trial
    confirmed: int = 0  # trials in a row with the same winner
    rates: dict[bool, float] = field(default_factory=dict)  # tokens per second
    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)


class Governor:
    """wanted() before each step, note() after it."""

    def __init__(self) -> None:
        self._sizes: dict[int, _Ways] = {}
        self._latest: _Ways | None = None  # of the latest step

    def wanted(self, rows: int) -> bool:
        """Whether drafts should be made for a step of so many rows."""
        return self._ways(rows).drafting

    def open(self) -> bool:
        """Whether drafts may soon be wanted: in steps like the latest they are made, or on trial."""
        latest = self._latest
        return latest is None or latest.drafting or latest.trial

    def note(self, rows: int, tokens: int, seconds: float) -> None:
        """A step of `rows` rows, each of which was up to date, brought `tokens` tokens in `seconds`."""
        ways = self._latest = self._ways(rows)
        ways.steps += 1
        if ways.steps == 1:
            return  # the first step after a change still does what was prepared the other way
        ways.seconds = [*ways.seconds[1 - TRIAL :], seconds]
        ways.tokens = [*ways.tokens[1 - TRIAL :], tokens]
        hopeless = ways.trial and len(ways.seconds) == EARLY and self._rate(ways) * MUCH < self._other(ways)
        if ways.steps > ways.limit or hopeless:
            self._judge(ways)

    @staticmethod
    def _rate(ways: _Ways) -> float:
        """Tokens per second. Other programs make single steps slow; the middle half of them does not mind."""
        ends = len(ways.seconds) // 4
        middle = sorted(ways.seconds)[ends : len(ways.seconds) - ends]
        return fmean(ways.tokens) / max(fmean(middle), 1e-9) / (GAIN if ways.drafting else 1.0)

    @staticmethod
    def _other(ways: _Ways) -> float:
        return ways.rates.get(not ways.drafting, 0.0)

    def _judge(self, ways: _Ways) -> None:
        """The way's time is up: take the better one, or try the other."""
        rate = ways.rates[ways.drafting] = self._rate(ways)
        other = self._other(ways)
        if not other or not ways.trial:
            self._turn(ways, not ways.drafting, TRIAL, trial=True)
            return
        # The way that is tried has been the losing one, unless this is the first comparison.
        ways.confirmed = 0 if rate > other else ways.confirmed + 1
        loss = max(rate, other) / max(min(rate, other), 1e-9) - 1.0
        wait = TRIAL * loss / COST * 2 ** min(ways.confirmed, 4)
        better = ways.drafting if rate > other else not ways.drafting
        self._turn(ways, better, int(min(max(wait, LEAST_WAIT), MOST_WAIT)), trial=False)

    def _turn(self, ways: _Ways, drafting: bool, limit: int, trial: bool) -> None:
        ways.drafting, ways.limit, ways.trial = drafting, limit, trial
        ways.steps = 0
        ways.seconds, ways.tokens = [], []

    def _ways(self, rows: int) -> _Ways:
        """Batches between two powers of two are alike."""
        return self._sizes.setdefault(rows.bit_length(), _Ways())
