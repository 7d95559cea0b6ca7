"""Speculative decoding: guesses are verified, and change nothing but the speed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_sampler import VOCAB, Bench, noise
from tiny import write_tiny

import quire
from quire import LLM, SamplingParams, sizing
from quire.cli.plan import make_plan
from quire.config import EngineOptions, Speculation
from quire.core.params import StructuredOutputsParams
from quire.core.plan import Span
from quire.engine.outputs import RequestOutput
from quire.errors import ConfigError
from quire.kernels.table import load_ops
from quire.layers.spec import LayerSpec, ModelLayout, StateSpec
from quire.resolve import choose_speculation, resolve
from quire.worker.sampler import Choices, Sampler

# ---- verification


@pytest.mark.parametrize(
    ("chosen", "drafts", "brought"),
    [
        ([4], (), [4]),
        ([4, 5, 6], (4, 5), [4, 5, 6]),
        ([4, 9, 6], (4, 5), [4, 9]),
        ([8, 5, 6], (4, 5), [8]),
        ([4, -1, 6], (4, 5), [4]),
        ([-1, 5, 6], (4, 5), [-1]),
    ],
)
def test_drafts_are_right_when_they_are_what_was_drawn(chosen: list[int], drafts: tuple[int, ...], brought: list[int]):
    choices = Choices(torch.tensor([3, *chosen, 3]), [3, *chosen, 3], {})
    assert Sampler.verify(choices, 1, drafts) == brought


def test_rows_of_one_request_are_chosen_as_one_after_the_other():
    params = SamplingParams(
        temperature=1.5,
        repetition_penalty=1.7,
        frequency_penalty=0.4,
        presence_penalty=0.3,
        min_tokens=4,
        top_k=30,
        stop_token_ids=[3, 4],
    )
    logits = 3 * noise(6)
    apart = Bench()
    apart.admit(2, params)
    said = []
    for row in range(6):
        said += apart.choose(logits[row : row + 1], [2]).tokens_host
        apart.slots.tokens[2, apart.lengths[2]] = said[-1]
        apart.lengths[2] += 1
    together = Bench()
    together.admit(2, params)
    together.slots.guess([Span(2, 2, 6, True, tuple(said[:5]))])
    rows = together.rows([2] * 6)
    rows.positions_host[:] = np.arange(3, 9)  # the tensor shares their memory
    assert together.sampler.choose(logits, rows).tokens_host == said
    assert max(said) < VOCAB


# ---- the promise

WISHES = (
    {"temperature": 0.0},
    {"temperature": 0.0, "repetition_penalty": 1.3, "logprobs": 2},
    {"temperature": 0.8, "seed": 5, "logprobs": 0},
    {"temperature": 0.6, "top_p": 0.9, "frequency_penalty": 0.4, "seed": 6},
    {"temperature": 0.5, "top_k": 8, "min_tokens": 12, "stop": ["the", "a "], "seed": 7},
    {"temperature": 0.0, "stop": ["and", "was"], "include_stop_str_in_output": True, "prompt_logprobs": 1},
    {"temperature": 0.4, "min_p": 0.1, "bad_words": ["the"], "logit_bias": {17: 3.0}, "seed": 8},
    {"temperature": 0.9, "n": 2, "seed": 9},
)
TEXT = "The fox ran to the river. The cat ran to the river. The dog ran to the"
SETTINGS = {"device": "cpu", "threads": 1, "kv_cache_memory_bytes": 1 << 26, "max_model_len": 256, "max_num_seqs": 12}
GUESSING = {"method": "ngram", "prompt_lookup_min": 1, "num_speculative_tokens": 5, "adaptive": False}
COPYING = {"method": "suffix", "prompt_lookup_min": 1, "adaptive": False}
DRAFTING = {"method": "draft_model", "num_speculative_tokens": 3, "adaptive": False}
WAYS = {
    "together": {},
    "planned ahead": {"async_scheduling": True},
    "chunked": {"max_num_batched_tokens": 13},
    "preempted": {"num_gpu_blocks_override": 14},
}


def ask(llm: LLM) -> list[RequestOutput]:
    prompts = [f"{TEXT} {end}" for end in ("river. The", "hill and", "river, and the", "sea.")] * 2
    params = [SamplingParams(max_tokens=40, ignore_eos=index % 2 == 0, **wish) for index, wish in enumerate(WISHES)]
    return llm.generate(prompts, params, use_tqdm=False)


def told(outputs: list[RequestOutput]) -> list[object]:
    return [(item.outputs, item.prompt_logprobs) for item in outputs]


@pytest.fixture(scope="module")
def plain() -> Iterator[list[object]]:
    with LLM(**SETTINGS) as llm:
        yield told(ask(llm))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("guessing", [GUESSING, COPYING, DRAFTING], ids=["ngram", "suffix", "draft model"])
def test_the_same_answers_with_guesses(plain: list[object], guessing: dict[str, object], way: str):
    with LLM(**{**SETTINGS, **WAYS[way]}, speculative_config=guessing) as llm:
        assert told(ask(llm)) == plain
        stats = llm._engine.stats()
    assert stats.drafts > 20
    assert 10 < stats.accepted_tokens < stats.draft_tokens
    assert stats.preemptions > 0 or way != "preempted"


def test_guesses_keep_to_the_grammar():
    """A row with a grammar gets the guesses that it allows; text, log-probabilities and end are as without."""
    forms = [None, StructuredOutputsParams(regex="(the river ){6}"), StructuredOutputsParams(regex="[a-z ]*")]
    found = []
    for options in ({}, {"speculative_config": GUESSING}):
        with LLM(**SETTINGS, **options) as llm:
            params = [
                SamplingParams(max_tokens=40, temperature=t, seed=3, logprobs=1, structured_outputs=form)
                for form in forms
                for t in (0.0, 0.6)
            ]
            found.append(told(llm.generate([TEXT] * 6, params, use_tqdm=False)))
            grammatical = SamplingParams(max_tokens=40, temperature=0.0, structured_outputs=forms[1])
            before = llm._engine.stats().accepted_tokens
            text = llm.generate(TEXT, grammatical, use_tqdm=False)[0].outputs[0].text
            accepted = llm._engine.stats().accepted_tokens - before
    assert found[0] == found[1]
    assert text.startswith("the river the river")
    assert accepted > 5


def test_fewer_steps_where_the_output_repeats_its_input():
    steps = []
    guessing = {"method": "ngram", "num_speculative_tokens": 6, "adaptive": False}
    for options in ({}, {"speculative_config": guessing}):
        with LLM(**SETTINGS, **options) as llm:
            params = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
            llm.generate("red blue green " * 12, params, use_tqdm=False)
            steps.append(llm._engine.stats().steps)
    assert steps[1] < 0.7 * steps[0]


def test_models_that_cannot_take_back_a_guess_get_no_drafts():
    wanted = Speculation("ngram")
    attention = LayerSpec("attention", heads=1, kv_heads=1, key_dim=4, value_dim=4)
    state = LayerSpec("mixer", kind="state", states=(StateSpec("sum", (1,), torch.float32),), group=1)
    plain = ModelLayout((attention,), 60, 4, "native")
    assert choose_speculation(wanted, plain, chunked=True).value is wanted
    assert choose_speculation(wanted, replace(plain, layers=(attention, state)), chunked=True).value is None
    assert choose_speculation(wanted, replace(plain, tier="B"), chunked=True).value is None
    assert choose_speculation(wanted, replace(plain, chunked_prefill=False), chunked=True).value is None
    assert choose_speculation(wanted, plain, chunked=False).value is None


# ---- the draft model

BUNDLED = Path(quire.__file__).parent / "bundled"


@pytest.mark.parametrize("way", ["together", "chunked", "preempted"])
@pytest.mark.parametrize("count", [3, 18])
def test_a_draft_model_that_is_the_model_itself_is_always_right(way: str, count: int):
    """Guesses are drawn with the numbers of the positions, so a perfect draft is accepted when sampling, too."""
    config = {"model": str(BUNDLED / "model"), "num_speculative_tokens": count, "adaptive": False}
    with LLM(**{**SETTINGS, **WAYS[way]}, speculative_config=config) as llm:
        params = [SamplingParams(max_tokens=60, ignore_eos=True, temperature=t, seed=4) for t in (0.0, 0.7, 1.0)]
        llm.generate([TEXT, "Once upon a time", "A"], params, use_tqdm=False)
        stats = llm._engine.stats()
    assert stats.accepted_tokens == stats.draft_tokens > 100


def test_no_guesses_at_the_end_of_the_context():
    with LLM(**{**SETTINGS, "max_model_len": 32}, speculative_config=DRAFTING) as llm:
        output = llm.generate("Once", SamplingParams(max_tokens=None, ignore_eos=True), use_tqdm=False)[0]
    assert len(output.prompt_token_ids) + len(output.outputs[0].token_ids) == 32


def test_a_draft_takes_its_share_of_the_memory():
    plain = resolve(EngineOptions.from_flat(SETTINGS))
    drafting = resolve(EngineOptions.from_flat({**SETTINGS, "speculative_config": DRAFTING}))
    assert drafting.memory.weights - plain.memory.weights > 2e6
    small, large = (sum(group.num_pages for group in config.groups) for config in (drafting, plain))
    assert small <= large
    costs = [
        sizing.group_costs(plain.layout, 16, torch.bfloat16, lambda *sizes: 100, draft)[0].page_bytes
        for draft in (None, drafting.draft.layout)
    ]
    assert costs == [600, 900]
    plans = [make_plan(config) for config in (plain, drafting)]
    assert [plan.groups[0].page_bytes for plan in plans] == [
        sizing.group_costs(plain.layout, plain.block_size, plain.cache_dtype, load_ops("cpu").cache_bytes, draft)[
            0
        ].page_bytes
        for draft in (None, drafting.draft.layout)
    ]
    assert plans[1].weights_bytes > plans[0].weights_bytes


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [("llama", {"vocab_size": 5000}, "do not share a tokenizer"), (None, {}, "name one with --spec-model")],
)
def test_drafts_that_do_not_fit(tmp_path: Path, family: str | None, changes: dict[str, object], message: str):
    options = dict(SETTINGS)
    if family is None:
        options |= {"model": str(BUNDLED / "model"), "spec_method": "draft_model"}
    else:
        options["spec_model"] = str(write_tiny(tmp_path / "draft", family, tokenizer=False, **changes))
    with pytest.raises(ConfigError, match=message):
        resolve(EngineOptions.from_flat(options))


# ---- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spec_method": "oracle"}, "'oracle'; quire has ngram"),
        ({"spec_tokens": 3}, "names no method"),
        ({"speculative_config": {"method": "ngram", "num_speculative_token": 3}}, "num_speculative_tokens"),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 0}}, "at least 1"),
        ({"speculative_config": {"method": "ngram", "prompt_lookup_min": 4, "prompt_lookup_max": 3}}, "is more than"),
    ],
)
def test_wishes_that_cannot_be_met(options: dict[str, object], message: str):
    with pytest.raises(ConfigError, match=message):
        LLM(**SETTINGS, **options)
