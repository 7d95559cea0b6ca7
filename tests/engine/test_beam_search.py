"""Beam search: the same sequences and scores as Transformers finds, pages shared, and wishes that cannot be met."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from typing import Any

import pytest
from library_beams import SETTINGS, library_beams, library_model

from quire import LLM, BeamSearchParams
from quire.engine.beams import BeamSearch
from quire.engine.logprobs import Logprob
from quire.errors import ValidationError

PROMPTS = ["The old man went to the", "Say again: mill blue London Clara.", "It was a dark night, and the captain said"]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(**SETTINGS, dtype="float32") as made:
        yield made


@pytest.fixture(scope="module")
def reference() -> Any:
    return library_model()


@pytest.mark.parametrize(
    ("width", "tokens", "penalty", "ends", "early"),
    [
        (2, 40, 1.0, None, False),
        (3, 20, 1.0, "own", False),
        (4, 16, 0.0, "common", False),
        (4, 16, 1.0, "common", False),
        (5, 12, 2.0, "common", False),
        (2, 24, -1.0, "common", False),
        (4, 16, 1.0, "common", True),
        (3, 16, -1.0, "common", True),
        (4, 16, 1.0, "common", "never"),
        (3, 20, -1.0, "common", "never"),
    ],
)
def test_the_sequences_of_transformers(
    llm: LLM, reference: Any, width: int, tokens: int, penalty: float, ends: Any, early: Any
):
    tokenizer = llm.get_tokenizer()
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    settings = llm._engine.settings
    if ends == "common":  # so that sequences end at different lengths, early and late
        stops = tuple({tokenizer.encode(text)[-1] for text in (" the", ",", " and")})
    else:
        stops = settings.eos_token_ids
    llm._engine.settings = type(settings)(**{**fields_of(settings), "eos_token_ids": stops})
    try:
        params = BeamSearchParams(
            beam_width=width,
            max_tokens=tokens,
            length_penalty=penalty,
            early_stopping=early,
            ignore_eos=ends is None,
        )
        outputs = llm.beam_search(prompts, params)
    finally:
        llm._engine.settings = settings
    for prompt, output in zip(prompts, outputs, strict=True):
        wanted = library_beams(reference, prompt, params, None if ends is None else list(stops))
        assert [sequence.tokens for sequence in output.sequences] == [row for row, _ in wanted]
        assert [sequence.score for sequence in output.sequences] == pytest.approx(
            [score for _, score in wanted], rel=1e-4
        )
    if ends == "common":
        assert {sequence.finish_reason for output in outputs for sequence in output.sequences} >= {"stop"}


def fields_of(settings: Any) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in settings.__dataclass_fields__}


def test_every_position_is_computed_once(llm: LLM):
    prompt = [5 + index % 40 for index in range(69)]
    before = llm._engine.stats()
    llm.beam_search([prompt], BeamSearchParams(beam_width=4, max_tokens=20, ignore_eos=True))
    after = llm._engine.stats()
    assert after.computed_tokens - before.computed_tokens == len(prompt) + 4 * 19, (
        "a beam computes its last token alone"
    )


def test_texts_and_limits(llm: LLM):
    params = BeamSearchParams(beam_width=2, max_tokens=500, ignore_eos=True, include_stop_str_in_output=True)
    text, ids = llm.beam_search([PROMPTS[0], [5, 6, 7]], params, concurrency_limit=1)
    assert all(sequence.text.startswith(PROMPTS[0]) for sequence in text.sequences)
    for output in (text, ids):
        assert [len(sequence.tokens) for sequence in output.sequences] == [128, 128]
        assert output.sequences[0].cum_logprob >= output.sequences[1].cum_logprob
    assert ids.sequences[0].tokens[:3] == [5, 6, 7]


def test_the_end_is_shown_when_asked_for():
    params = BeamSearchParams(beam_width=1, max_tokens=5, include_stop_str_in_output=True)
    search = BeamSearch([1], params, frozenset([9]), 5)
    search.advance([{9: Logprob(-0.1), 3: Logprob(-2.0)}])
    assert search.running == []
    found = search.sequences()[0]
    assert (found.tokens, found.finish_reason, found.stop_reason) == ([1, 9], "stop", 9)


def test_a_full_search_finds_the_best_sequence():
    """With as many beams as sequences, the best of all is found, whatever the order of the scores."""
    rng = random.Random(2)
    scores: dict[tuple[int, ...], list[float]] = {}

    def score(tokens: tuple[int, ...]) -> dict[int, float]:
        weights = scores.setdefault(tokens, [rng.random() for _ in range(3)])
        return {token: math.log(weight / sum(weights)) for token, weight in enumerate(weights)}

    search = BeamSearch([0], BeamSearchParams(beam_width=81, max_tokens=4), frozenset(), 4)
    while search.running:
        scored = [score(tuple(beam.tokens)) for beam in search.running]
        search.advance([{token: Logprob(value) for token, value in best.items()} for best in scored])
    every: dict[tuple[int, ...], float] = {(0,): 0.0}
    for _ in range(4):
        every = {(*seq, t): s + more for seq, s in every.items() for t, more in score(seq).items()}
    assert len(search.sequences()) == 81
    assert tuple(search.sequences()[0].tokens) == max(every, key=every.__getitem__)


def test_wishes_that_cannot_be_met(llm: LLM):
    with pytest.raises(ValidationError, match="max_logprobs=31"):
        llm.beam_search("a", BeamSearchParams(beam_width=31, max_tokens=2, ignore_eos=True))
    with pytest.raises(ValidationError, match="beam_width"):
        BeamSearchParams(beam_width=0, max_tokens=2)
    with pytest.raises(ValidationError, match="early_stopping"):
        BeamSearchParams(beam_width=2, max_tokens=2, early_stopping="soon")
    settings = llm._engine.settings
    llm._engine.settings = type(settings)(**{**fields_of(settings), "logprobs_mode": "raw_logits"})
    try:
        with pytest.raises(ValidationError, match="raw_logprobs"):
            llm.beam_search("a", BeamSearchParams(beam_width=2, max_tokens=2))
    finally:
        llm._engine.settings = settings


def test_log_probabilities_of_sequences(llm: LLM):
    """They add up to a sequence's own, its end included; the others are the likeliest ones."""
    plain = llm.beam_search(PROMPTS, BeamSearchParams(beam_width=3, max_tokens=10))
    told = llm.beam_search(PROMPTS, BeamSearchParams(beam_width=3, max_tokens=10, logprobs=7))
    for one, other in zip(plain, told, strict=True):
        for bare, sequence in zip(one.sequences, other.sequences, strict=True):
            assert (bare.tokens, bare.logprobs) == (sequence.tokens, None) and sequence.logprobs is not None
            chosen = [next(iter(entry.values())).logprob for entry in sequence.logprobs]
            assert sum(chosen) == pytest.approx(sequence.cum_logprob, abs=1e-4)
            said = [next(iter(entry)) for entry in sequence.logprobs]
            kept = said[:-1] if sequence.finish_reason == "stop" else said
            assert sequence.tokens[len(sequence.tokens) - len(kept) :] == kept
            for entry in sequence.logprobs:
                ranks = sorted(found.rank for found in entry.values())
                assert ranks[:7] == list(range(1, 8)) and len(ranks) <= 8
    with pytest.raises(ValidationError, match="at most 20"):
        llm.beam_search(PROMPTS, BeamSearchParams(beam_width=2, max_tokens=2, logprobs=21))
