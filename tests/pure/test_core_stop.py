"""Stop rules: which token ends a request, in which order the rules are asked, and what is reported."""

from __future__ import annotations

import pytest

from quire.core.params import PoolingParams, RepetitionDetection, SamplingParams
from quire.core.stop import Stop, check_stop, repeats, stop_rules

PROMPT = [7, 8]


def judge(output: list[int], longest: int = 100, **asked: object) -> Stop | None:
    """The verdict on an output after PROMPT."""
    eos = asked.pop("eos_token_ids", (2, 3))
    params = SamplingParams(**asked).resolved(eos_token_ids=eos)
    return check_stop(PROMPT + output, stop_rules(params, len(PROMPT), longest))


def test_end_of_sequence_is_not_reported_as_a_stop_reason() -> None:
    assert judge([5, 2]) == Stop("stop")
    assert judge([5, 3]) == Stop("stop", 3), "one of the generation config's is"
    assert judge([5, 6]) is None


def test_stop_token_ids() -> None:
    assert judge([5], stop_token_ids=[5]) == Stop("stop", 5)
    assert judge([2], stop_token_ids=[2]) == Stop("stop"), "end of sequence is asked first"


def test_ignore_eos_silences_all_end_ids_but_not_the_users() -> None:
    assert judge([2], ignore_eos=True) is None
    assert judge([3], ignore_eos=True) is None
    assert judge([3], ignore_eos=True, stop_token_ids=[3]) == Stop("stop", 3)
    assert SamplingParams(ignore_eos=True).resolved(eos_token_ids=[2]).all_stop_token_ids == {2}


def test_length() -> None:
    assert judge([5, 5, 5], max_tokens=3) == Stop("length")
    assert judge([5, 5], max_tokens=3) is None
    assert judge([5, 5, 5], max_tokens=None, longest=5) == Stop("length")
    assert judge([5, 5, 2], max_tokens=3) == Stop("stop"), "the stop is asked before the length"


def test_min_tokens() -> None:
    assert judge([2], min_tokens=2) is None
    assert judge([5, 2], min_tokens=2) == Stop("stop")
    assert judge([5], min_tokens=2, stop_token_ids=[5]) is None
    assert judge([5, 5, 5], min_tokens=9, longest=5) == Stop("length"), "no minimum lengthens the model"


def test_the_prompt_never_stops_anything() -> None:
    rules = stop_rules(SamplingParams(stop_token_ids=[8]), len(PROMPT), 100)
    assert check_stop(PROMPT, rules) is None


def test_no_end_of_sequence_at_all() -> None:
    rules = stop_rules(SamplingParams(), 1, 100)
    assert rules.eos is None and rules.watched == frozenset()
    assert check_stop([1, 0], rules) is None


def test_a_vector_ends_after_its_prompt() -> None:
    assert stop_rules(PoolingParams(), 10, 10).limit == 11


@pytest.mark.parametrize(
    ("output", "least", "most", "count", "found"),
    [
        ([1, 2, 1, 2, 1, 2], 1, 2, 3, True),
        ([1, 2, 1, 2, 1, 2], 1, 1, 3, False),
        ([1, 2, 1, 2], 1, 2, 3, False),
        ([5, 1, 1, 1], 1, 4, 3, True),
        ([5, 1, 1, 1], 2, 4, 3, False),
        ([9, 1, 2, 3, 1, 2, 3], 1, 3, 2, True),
        ([1, 2, 3, 1, 2, 4], 1, 3, 2, False),
        ([7, 8], 1, 2, 2, False),
    ],
)
def test_repetition(output: list[int], least: int, most: int, count: int, found: bool) -> None:
    rule = RepetitionDetection(min_pattern_size=least, max_pattern_size=most, min_count=count)
    assert repeats(PROMPT + output, len(PROMPT), rule) is found
    verdict = judge(output, eos_token_ids=(), repetition_detection=rule)
    assert verdict == (Stop("repetition") if found else None)
