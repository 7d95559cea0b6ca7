"""What guesses are made of: copies from the history, and the governor that judges whether guessing pays."""

from __future__ import annotations

import random
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import pytest
from guesses import history_of

from quire import SamplingParams
from quire.core.plan import Admission, Span, SpanResult, StepPlan
from quire.worker.drafter import Seen
from quire.worker.governor import BLIND, COST, EARLY, LEAST_WAIT, MUCH, TRIAL, Governor
from quire.worker.ngram import NgramDrafter
from quire.worker.speculate import Speculator
from quire.worker.suffix import SuffixDrafter


def looked_up(tokens: list[int], count: int, shortest: int, longest: int) -> tuple[int, ...]:
    """The definition: the longest end that came before; of its places the one with the most to copy, then the last."""
    for size in range(longest, shortest - 1, -1):
        end = tokens[-size:]
        places = [i + size for i in range(len(tokens) - size) if tokens[i : i + size] == end]
        if places and len(tokens) > size:
            best = max(places, key=lambda place: (min(count, len(tokens) - place), place))
            return tuple(tokens[best : best + count])
    return ()


def test_lookup_finds_what_its_definition_says():
    rng = random.Random(1)
    rows = [[rng.randrange(rng.choice((2, 3, 8))) for _ in range(rng.randint(1, 60))] for _ in range(120)]
    history = history_of(*rows)
    for count, shortest, longest in ((4, 2, 5), (1, 1, 1), (9, 3, 3), (3, 1, 8)):
        found = NgramDrafter(history, count, shortest, longest).propose(np.arange(120))
        assert found == [looked_up(tokens, count, shortest, longest) for tokens in rows]
        assert sum(map(bool, found)) > 30


def longest_copied(tokens: list[int], count: int, shortest: int, longest: int) -> tuple[int, ...]:
    """The definition: behind the longest end that came before; of its places the last with the commonest successor."""
    for size in range(min(longest, len(tokens) - 1), shortest - 1, -1):
        places = [i + size for i in range(len(tokens) - size) if tokens[i : i + size] == tokens[-size:]]
        if places:
            following = [tokens[place] for place in places]
            commonest = max(sorted(set(following)), key=following.count)
            best = max(place for place in places if tokens[place] == commonest)
            return tuple(tokens[best : best + min(count, size)])
    return ()


def test_suffix_lookup_finds_the_longest_end_and_keeps_to_it():
    rng = random.Random(2)
    rows = [[rng.randrange(rng.choice((2, 3, 8))) for _ in range(rng.randint(1, 60))] for _ in range(120)]
    for count, shortest, longest in ((4, 2, 64), (1, 1, 3), (9, 3, 20)):
        found = SuffixDrafter(history_of(*rows), count, shortest, longest, 1.0).propose(np.arange(120))
        assert found == [longest_copied(tokens, count, shortest, longest) for tokens in rows]
        assert sum(map(bool, found)) > 30
    text = list(range(40))
    history = history_of([*text, 50, *text[:3]], width=200)
    drafter = SuffixDrafter(history, 8, 2, 64, 1.0)
    said, guessed = 3, []
    while said < 30:
        guessed.append(drafter.propose(np.arange(1))[0])
        more = (*guessed[-1], text[said + len(guessed[-1])])
        history.extend(0, 41 + said, more)
        said += len(more)
    assert list(map(len, guessed)) == [3, 7, 8, 8], "the longer the match, the longer the guess"
    history.extend(0, 41 + said, (99,))
    assert drafter.propose(np.arange(1)) == [()], "what is copied has ended"


def test_history_goes_on_where_the_span_began():
    history = history_of([1, 2, 3])
    history.extend(0, 3, (4, 5))
    assert history.tokens[0, : history.lengths[0]].tolist() == [1, 2, 3, 4, 5]


def tell(governor: Governor, rows: int, tokens: float, seconds: float, blind: bool = False) -> None:
    """A step that brought so many tokens, as many of each row."""
    governor.note(range(rows), [tokens / rows] * rows, seconds, blind)


@pytest.mark.parametrize("better", [True, False])
def test_governor_takes_the_faster_way(better: bool):
    governor, drafted = Governor(), 0
    steps = 40 * LEAST_WAIT
    for step in range(steps):
        drafting = governor.wanted(4)
        drafted += drafting
        slow = step % 5 == 0  # another program
        tell(governor, 4, 10 if drafting else 4, (0.002 if drafting == better else 0.02) * (9 if slow else 1))
    assert (drafted > 0.8 * steps) == better
    assert better or drafted < 4 * (EARLY + 1), "trials that fail are short, and get rarer"
    assert 0 < drafted < steps, "the other way is tried from time to time"
    assert not governor.wanted(64), "another size of batch begins without"


@pytest.mark.parametrize("slowdown", [1.05, MUCH, 3.0])
def test_guesses_that_do_not_pay_cost_little(slowdown: float):
    """What the trials take, beside the same steps without drafts: once a few steps, then their share of the time."""
    governor, taken = Governor(), 0.0
    assert governor.open(), "nothing is known yet"
    steps = 50_000
    for _ in range(steps):
        seconds = slowdown if governor.wanted(32) else 1.0
        taken += seconds
        tell(governor, 32, 32, seconds)
    assert taken / steps < 1 + COST + (TRIAL + 1) * slowdown / steps
    assert not governor.open() or governor.wanted(32)


def test_guesses_that_no_longer_pay_are_left_off_at_once():
    """Texts that copied themselves have ended, others have begun: nobody waits for the next trial."""
    governor = Governor()
    for _ in range(10 * LEAST_WAIT):
        tell(governor, 32, 64 if governor.wanted(32) else 32, 1.1 if governor.wanted(32) else 1.0)
    assert governor.wanted(32)
    drafted = 0
    for _ in range(LEAST_WAIT):
        drafted += governor.wanted(32)
        tell(governor, 32, 32, 1.1 if governor.wanted(32) else 1.0)
    assert drafted <= 2 * TRIAL


def test_what_few_rows_gain_is_not_paid_by_all_others():
    """A quarter of the rows copies four tokens a step: more tokens in all, but most rows wait longer for each."""
    governor, drafted = Governor(), 0
    for _ in range(3000):
        drafting = governor.wanted(32)
        drafted += drafting
        governor.note(range(32), [4] * 8 + [1] * 24 if drafting else [1] * 32, 1.4 if drafting else 1.0)
    assert drafted < 0.05 * 3000
    for _ in range(3000):  # all rows copy, by turns
        drafting = governor.wanted(32)
        drafted += drafting
        tokens = [4 if drafted % 4 == row % 4 else 1 for row in range(32)] if drafting else [1] * 32
        governor.note(range(32), tokens, 1.4 if drafting else 1.0)
    assert drafted > 1000


def test_what_a_trial_takes_to_begin_counts():
    """A draft that must read whole texts before its first guess is tried the more seldom."""
    governor, taken, before = Governor(), 0.0, False
    steps = 50_000
    for _ in range(steps):
        drafting = governor.wanted(32)
        seconds = 1.0 if not drafting else 3.0 if before else 60.0
        before = drafting
        taken += seconds
        tell(governor, 32, 32, seconds)
    assert taken / steps < 1 + COST + 2 * (60 + 3 * TRIAL) / steps


def test_a_trial_without_anything_to_go_on_from_ends():
    governor, tried = Governor(), 0
    for _ in range(5000):
        drafting = governor.wanted(8)
        tried += drafting
        tell(governor, 8, 8, 1.02 if drafting else 1.0, blind=drafting)
    assert BLIND <= tried < 5000 * COST / 0.02 + 2 * BLIND


class Parrot:
    """A drafter that says what it is told, or fails."""

    def __init__(self, guess: tuple[int, ...] | None) -> None:
        self.guess = guess

    def admit(self, new: Admission) -> None:
        pass

    def release(self, slot: int) -> None:
        pass

    def begin(self, plan: StepPlan) -> None:
        pass

    def follow(self, seen: Seen) -> None:
        pass

    def propose(self, slots: np.ndarray) -> list[tuple[int, ...]]:
        if self.guess is None:
            raise FloatingPointError("no idea")
        return [self.guess] * len(slots)


def test_who_gets_drafts():
    """Neither whose output ends with this token, nor whose prompt goes on."""
    history = history_of([1], [1], [1])
    speculator = Speculator(history, Parrot((5, 6)), None)
    for slot, params in enumerate((SamplingParams(), SamplingParams(max_tokens=1), SamplingParams())):
        speculator.admit(Admission(slot, str(slot), (1, 2), 2, params, 0))
    spans = [Span(0, 1, 1, True), Span(1, 1, 1, True), Span(2, 0, 1, False)]
    results = (SpanResult(0, (3,)), SpanResult(1, (3,)), SpanResult(2))
    found = speculator.propose(spans, results, 0.0)
    assert [result.drafts for result in found] == [(5, 6), (), ()]


class Notebook(Governor):
    """A governor that writes down what it is told, and never wants drafts."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []

    def wanted(self, rows: int) -> bool:
        return False

    def note(self, rows: Sequence[int], tokens: Sequence[float], seconds: float, blind: bool = False) -> None:
        self.seconds.append(seconds)


def test_steps_are_judged_with_what_lies_between_them(monkeypatch: pytest.MonkeyPatch):
    """A step of the same rows counts from the end of the one before; one behind a prompt from its own beginning."""
    notebook = Notebook()
    speculator = Speculator(history_of([1]), Parrot((5,)), notebook)
    speculator.admit(Admission(0, "a", (1, 2), 2, SamplingParams(), 0))
    for end, span in ((10.0, Span(0, 0, 2, True)), (20.0, Span(0, 2, 1, True)), (30.0, Span(0, 3, 1, True))):
        monkeypatch.setattr("quire.worker.speculate.time", SimpleNamespace(perf_counter=lambda end=end: end))
        speculator.propose([span], (SpanResult(0, (3,)),), end - 1.0)
    assert notebook.seconds == [1.0, 10.0], "a prompt is no step to judge by"


def test_a_drafter_that_fails_harms_nobody():
    speculator = Speculator(history_of([1]), Parrot(None), None)
    speculator.admit(Admission(0, "a", (1, 2), 2, SamplingParams(), 0))
    assert speculator.propose([Span(0, 1, 1, True)], (SpanResult(0, (3,)),), 0.0) == (SpanResult(0, (3,)),)
