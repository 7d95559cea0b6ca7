"""SamplingParams and PoolingParams: defaults, normalization, and an error that names the field for each wrong value."""

from __future__ import annotations

import dataclasses
import logging
import math

import pytest

from quire.core.params import PoolingParams, RepetitionDetection, RequestOutputKind, SamplingParams
from quire.errors import ClientError, ValidationError


def test_defaults() -> None:
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.top_k, params.min_p) == (1, 1.0, 1.0, 0, 0.0)
    assert (params.max_tokens, params.min_tokens, params.seed) == (16, 0, None)
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (0.0, 0.0, 1.0)
    assert (params.stop, params.stop_token_ids, params.logit_bias, params.bad_words) == ((), (), (), ())
    assert params.logprobs is None and params.prompt_logprobs is None and params.allowed_token_ids is None
    assert params.detokenize and params.skip_special_tokens and params.spaces_between_special_tokens
    assert not params.ignore_eos and not params.include_stop_str_in_output
    assert params.output_kind is RequestOutputKind.CUMULATIVE
    assert params.skip_reading_prefix_cache is False


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0),
        ("n", 16385),
        ("n", True),
        ("n", 1.0),
        ("presence_penalty", 2.1),
        ("presence_penalty", "1"),
        ("frequency_penalty", -2.1),
        ("repetition_penalty", 0),
        ("repetition_penalty", math.inf),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", math.nan),
        ("temperature", None),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("top_k", 1.5),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("seed", "7"),
        ("seed", 2**63),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", [1]),
        ("stop", 1),
        ("stop_token_ids", ["a"]),
        ("stop_token_ids", "12"),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", 5),
        ("ignore_eos", 1),
        ("max_tokens", 0),
        ("max_tokens", 2.0),
        ("min_tokens", -1),
        ("min_tokens", 17),
        ("logprobs", -2),
        ("logprobs", 1.0),
        ("prompt_logprobs", "5"),
        ("detokenize", None),
        ("output_kind", 3),
        ("logit_bias", {"a": 1}),
        ("logit_bias", {1: "x"}),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {1: math.nan}),
        ("logit_bias", 3),
        ("logit_bias", [1, 2]),
        ("allowed_token_ids", []),
        ("allowed_token_ids", [1.5]),
        ("bad_words", [""]),
        ("bad_words", 3),
        ("repetition_detection", 3),
        ("extra_args", [1]),
        ("extra_args", {1: 2}),
        ("extra_args", {"a": 2**64}),
    ],
)
def test_a_wrong_value_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ValidationError) as caught:
        SamplingParams(**{field: value})
    assert caught.value.field == field
    assert field in str(caught.value)
    assert caught.value.status == 400


def test_errors_are_value_errors_and_client_errors() -> None:
    with pytest.raises(ValueError):
        SamplingParams(top_p=2)
    with pytest.raises(ClientError):
        SamplingParams(top_p=2)


def test_an_unknown_keyword_names_the_nearest_one() -> None:
    with pytest.raises(ValidationError, match="no field 'temprature'. Did you mean 'temperature'"):
        SamplingParams(temprature=0.5)
    with pytest.raises(ValidationError, match="no field 'qqqqq'"):
        SamplingParams(qqqqq=1)
    with pytest.raises(ValidationError, match="'dimensions'"):
        PoolingParams(dimension=3)


def test_setting_a_field_says_how_to_have_it() -> None:
    params = SamplingParams(temperature=0.5)
    with pytest.raises(AttributeError, match=r"dataclasses\.replace\(params, max_tokens=5\)"):
        params.max_tokens = 5  # type: ignore[misc]
    assert params.max_tokens == 16 and dataclasses.replace(params, max_tokens=5).max_tokens == 5


def test_greedy_switches_the_filters_off() -> None:
    params = SamplingParams(temperature=0, top_p=0.5, top_k=5, min_p=0.1)
    assert params.greedy
    assert (params.top_p, params.top_k, params.min_p) == (1.0, 0, 0.0)
    assert not SamplingParams(temperature=0.5).greedy


def test_greedy_cannot_give_several_answers() -> None:
    with pytest.raises(ValidationError, match="n must be 1 when using greedy sampling"):
        SamplingParams(temperature=0.0, n=2)


def test_a_tiny_temperature_is_raised_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert SamplingParams(temperature=1e-6).temperature == 0.01
    assert "0.01" in caplog.text


def test_values_are_normalized() -> None:
    params = SamplingParams(
        stop="END",
        stop_token_ids=[5, 5, 6],
        top_k=-1,
        seed=-1,
        temperature=1,
        logprobs=True,
        prompt_logprobs=False,
        logit_bias={"7": 200, 8: -200.0},
        bad_words=["a b"],
        allowed_token_ids=[1, 2],
        output_kind=1,
    )
    assert params.stop == ("END",)
    assert params.stop_token_ids == (5, 6)
    assert params.top_k == 0
    assert params.seed is None
    assert isinstance(params.temperature, float)
    assert params.logprobs == 1 and params.prompt_logprobs is None
    assert params.logit_bias == ((7, 100.0), (8, -100.0))
    assert params.bad_words == ("a b",) and params.allowed_token_ids == (1, 2)
    assert params.output_kind is RequestOutputKind.DELTA
    assert SamplingParams(stop=None, stop_token_ids=None, logit_bias=None, bad_words=None).stop == ()


def test_stop_strings_need_text() -> None:
    with pytest.raises(ValidationError, match="detokenize"):
        SamplingParams(stop=["x"], detokenize=False)


def test_prompt_logprobs_keep_away_from_the_prefix_cache() -> None:
    assert SamplingParams(prompt_logprobs=0).skip_reading_prefix_cache is True
    assert SamplingParams(prompt_logprobs=0, skip_reading_prefix_cache=False).skip_reading_prefix_cache is False


def test_params_cannot_be_changed() -> None:
    params = SamplingParams()
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.n = 2
    assert params == SamplingParams()
    assert hash(SamplingParams(extra_args={"a": 1})) is not None


def test_resolved_fills_in_what_the_engine_knows() -> None:
    asked = SamplingParams(max_tokens=None, min_tokens=50, stop_token_ids=[9], bad_words=["no"])
    params = asked.resolved(max_tokens=20, seed=4, eos_token_ids=[2, 3], bad_words_token_ids=[[7, 7], [8]])
    assert (params.max_tokens, params.min_tokens, params.seed) == (20, 20, 4)
    assert params.eos_token_ids == (2, 3)
    assert params.bad_words_token_ids == ((7, 7), (8,))
    assert params.all_stop_token_ids == {2, 3, 9}
    assert params.bad_words == ("no",)
    with pytest.raises(ValidationError, match="bad_words"):
        asked.resolved(bad_words_token_ids=[[1]] * 129)


def test_check_knows_the_vocabulary_and_the_limits() -> None:
    SamplingParams(stop_token_ids=[9], logit_bias={9: 1}, allowed_token_ids=[9], logprobs=5).check(10, max_logprobs=5)
    for field, value in (("stop_token_ids", [10]), ("allowed_token_ids", [3, 11]), ("logit_bias", {10: 1.0})):
        with pytest.raises(ValidationError, match="outside the vocabulary") as caught:
            SamplingParams(**{field: value}).check(10)
        assert caught.value.field == field
    for asked in (6, -1):
        with pytest.raises(ValidationError, match="at most 5"):
            SamplingParams(logprobs=asked).check(10, max_logprobs=5)
        with pytest.raises(ValidationError, match="at most 5"):
            SamplingParams(prompt_logprobs=asked).check(10, max_logprobs=5)
    SamplingParams(logprobs=-1).check(10, max_logprobs=-1)


def test_repetition_detection() -> None:
    params = SamplingParams(repetition_detection={"max_pattern_size": 4, "min_count": 2})
    assert params.repetition_detection == RepetitionDetection(max_pattern_size=4, min_count=2)
    for wrong in (
        {"max_pattern_size": 0},
        {"max_pattern_size": 2, "min_pattern_size": 3},
        {"max_pattern_size": 2, "min_count": 1},
    ):
        with pytest.raises(ValidationError, match="repetition_detection"):
            RepetitionDetection(**wrong)


def test_pooling_params() -> None:
    assert PoolingParams().task == "embed"
    assert PoolingParams().skip_reading_prefix_cache is False
    assert PoolingParams(task="token_embed").skip_reading_prefix_cache is True
    with pytest.raises(ValidationError, match="task"):
        PoolingParams(task="guess")
    with pytest.raises(ValidationError, match="dimensions"):
        PoolingParams(dimensions=0)
    with pytest.raises(ValidationError, match="use_activation"):
        PoolingParams(use_activation=1)
