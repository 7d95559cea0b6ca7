"""Governor: whether drafting pays, found out by trying both ways while the engine runs.

What counts is how long the rows wait for a token on average, for each size of batch: acceptance, the drafter's own cost
and the price of a wider step are all in it. Tokens per second would not do: where few rows copy whole sentences and all
others wait for the wider steps, there are more tokens, and most requests end later, the batch among them. It decides about
speed alone, since drafts never change what is said.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

TRIAL = 8  # steps of a way, after the first, that decide about it
EARLY = 3  # steps that are enough where the other way is much better
MUCH = 1.2
GAIN = 1.1  # drafting is to be so much faster at least to be begun with: over a few steps less is luck
COST = 0.01  # share of the time that trying the losing way may take
LEAST_WAIT = 64  # steps between two trials
MOST_WAIT = 16384
BLIND = 64  # steps of a trial in which the drafter may be without guesses for want of what it goes on from


@dataclass(slots=True)
class _Ways:
    """Both ways for one size of batch. The plain one comes first: knowing it costs nothing."""

    drafting: bool = False
    steps: int = 0  # with the present way
    limit: int = EARLY  # after which the other one is tried
    trial: bool = True  # the present way is on trial
    confirmed: int = 0  # trials in a row with the same winner
    blind: int = 0  # steps of the trial that say nothing of the way
    spent: float = 0.0  # seconds of the trial, all its steps counted
    made: float = 0.0  # tokens in them, of a row that waits as long as rows do on average
    rates: dict[bool, float] = field(default_factory=dict)  # as `rate`, when the way was last judged
    seconds: list[float] = field(default_factory=list)  # of the latest steps
    brought: list[dict[int, float]] = field(default_factory=list)  # tokens of each row in them

    @property
    def rate(self) -> float:
        """Tokens per second of a row that waits as long as rows do on average. Other programs make single steps slow; the
        middle half of them does not mind."""
        ends = len(self.seconds) // 4
        middle = sorted(self.seconds)[ends : len(self.seconds) - ends]
        steps, tokens = Counter[int](), Counter[int]()
        for step in self.brought:
            steps.update(step.keys())
            tokens.update(step)
        waits = fmean(count / max(tokens[row], 1e-9) for row, count in steps.items())
        return 1.0 / max(fmean(middle) * waits, 1e-9)

    @property
    def other(self) -> float:
        """What the way had that is not the present one; 0 when it was never tried."""
        return self.rates.get(not self.drafting, 0.0)

    def turn(self, drafting: bool, limit: float, trial: bool) -> None:
        """From now on this way."""
        self.drafting, self.limit, self.trial = drafting, int(min(max(limit, EARLY), MOST_WAIT)), trial
        self.steps = self.blind = 0
        self.spent = self.made = 0.0
        self.seconds, self.brought = [], []


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

    def note(self, rows: Sequence[int], tokens: Sequence[float], seconds: float, blind: bool = False) -> None:
        """A step of these rows, each of which was up to date, brought so many tokens of each in `seconds`. `blind`: drafts
        were wanted, and the drafter did not have what it goes on from."""
        ways = self._latest = self._ways(len(rows))
        ways.steps += 1
        ways.spent += seconds
        ways.made += len(rows) / sum(1.0 / max(count, 1e-9) for count in tokens)
        if blind and ways.trial:
            ways.blind += 1
            if ways.blind > BLIND:
                self._lost(ways)
            return
        if ways.steps - ways.blind == 1:
            return  # the first step after a change still does what was prepared the other way
        if not ways.drafting and not ways.trial and ways.steps <= ways.limit - TRIAL:
            return  # long before anybody looks at the last steps
        ways.seconds = [*ways.seconds[1 - TRIAL :], seconds]
        ways.brought = [*ways.brought[1 - TRIAL :], dict(zip(rows, tokens, strict=True))]
        if not ways.trial and ways.drafting and ways.steps % TRIAL == 1 and ways.rate < ways.other:
            # It has paid, and no longer does: the texts go on otherwise, or others have begun.
            ways.confirmed = 0
            ways.turn(False, LEAST_WAIT, trial=False)
            return
        hopeless = ways.trial and len(ways.seconds) == EARLY and ways.rate * MUCH < ways.other
        if ways.steps - ways.blind > ways.limit or hopeless:
            self._judge(ways)

    def _judge(self, ways: _Ways) -> None:
        """The way's time is up: take the better one, or try the other."""
        ways.rates[ways.drafting] = ways.rate
        if not ways.other or not ways.trial:
            ways.turn(not ways.drafting, TRIAL, trial=True)
        elif ways.rates[True] > ways.rates[False] * GAIN:
            ways.confirmed = 0 if ways.drafting else ways.confirmed + 1
            loss = TRIAL * (ways.rates[True] / ways.rates[False] - 1.0)
            ways.turn(True, max(LEAST_WAIT, loss / COST * 2 ** min(ways.confirmed, 4)), trial=False)
        elif ways.drafting:
            self._lost(ways)
        else:
            ways.confirmed = 0
            ways.turn(False, LEAST_WAIT, trial=False)

    @staticmethod
    def _lost(ways: _Ways) -> None:
        """Drafting was tried and does not pay: it is not tried again before the time that this took is a small share."""
        ways.confirmed += 1
        loss = ways.spent * ways.other - ways.made  # in steps without drafts, which bring a token for each row
        ways.turn(False, max(LEAST_WAIT, loss / COST * 2 ** min(ways.confirmed - 1, 4)), trial=False)

    def _ways(self, rows: int) -> _Ways:
        """Batches between two powers of two are alike."""
        return self._sizes.setdefault(rows.bit_length(), _Ways())
