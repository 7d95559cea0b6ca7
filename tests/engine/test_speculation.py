"""Speculative decoding: the guesses, their verification, and the promise that they change nothing but the speed."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

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
from quire.core.plan import Admission, Span, SpanResult, StepPlan
from quire.engine.outputs import RequestOutput
from quire.errors import ConfigError
from quire.kernels.table import load_ops
from quire.layers.spec import LayerSpec, ModelLayout, StateSpec
from quire.resolve import choose_speculation, resolve
from quire.worker.drafter import History, Seen
from quire.worker.governor import BLIND, COST, EARLY, LEAST_WAIT, MUCH, TRIAL, Governor
from quire.worker.ngram import NgramDrafter
from quire.worker.sampler import Choices, Sampler
from quire.worker.speculate import Speculator
from quire.worker.suffix import SuffixDrafter

# ---- guesses


def history_of(*rows: list[int], width: int = 80) -> History:
    history = History(len(rows), width)
    history.tokens[:] = 7  # what lies behind a row's end must not count
    for slot, tokens in enumerate(rows):
        history.admit(Admission(slot, str(slot), tuple(tokens), 1, SamplingParams(), 0))
    return history


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


def test_the_distribution_is_that_of_the_model():
    """Chi-square of texts of four tokens over many seeds, drawn with guesses, against the model's own scores."""
    seeds = 1500
    wish = {"temperature": 1.0, "top_k": 3, "top_p": 0.9}
    config = {"method": "draft_model", "num_speculative_tokens": 3, "adaptive": False}
    with LLM(**SETTINGS, speculative_config=config) as llm:
        ids = llm.get_tokenizer().encode(TEXT)
        params = [SamplingParams(**wish, seed=seed, max_tokens=4, ignore_eos=True) for seed in range(seeds)]
        outputs = llm.generate([{"prompt_token_ids": ids}] * seeds, params, use_tqdm=False)
        stats = llm._engine.stats()
        expected = chances(llm, ids, **wish)
    said = Counter(tuple(output.outputs[0].token_ids) for output in outputs)
    assert min(stats.accepted_tokens, stats.draft_tokens - stats.accepted_tokens) > seeds / 4
    assert set(said) <= set(expected), "what is cut off is never said"
    cells = [(said[text], seeds * chance) for text, chance in expected.items() if seeds * chance >= 5]
    cells.append((seeds - sum(count for count, _ in cells), seeds - sum(chance for _, chance in cells)))
    distance = sum((count - chance) ** 2 / chance for count, chance in cells)
    freedom = len(cells) - 1
    assert freedom >= 20
    # The 0.9999 quantile, by Wilson and Hilferty; seeds are fixed, so this is no matter of luck.
    assert distance < freedom * (1 - 2 / (9 * freedom) + 3.72 * (2 / (9 * freedom)) ** 0.5) ** 3


def chances(llm: LLM, ids: list[int], temperature: float, top_k: int, top_p: float) -> dict[tuple[int, ...], float]:
    """The chance of each text of four tokens, from the model's log-probabilities, asked for token by token."""
    found: dict[tuple[int, ...], float] = {(): 1.0}
    one = SamplingParams(max_tokens=1, temperature=0.0, logprobs=20, ignore_eos=True)
    for _ in range(4):
        texts = list(found)
        outputs = llm.generate([{"prompt_token_ids": [*ids, *text]} for text in texts], one, use_tqdm=False)
        longer: dict[tuple[int, ...], float] = {}
        for text, output in zip(texts, outputs, strict=True):
            entries = output.outputs[0].logprobs[0].items()
            scores = {token: entry.logprob / temperature for token, entry in entries}
            for token, share in kept_shares(scores, top_k, top_p).items():
                longer[(*text, token)] = found[text] * share
        found = longer
    return found


def kept_shares(scores: dict[int, float], top_k: int, top_p: float) -> dict[int, float]:
    """What each token's chance is when only the likeliest are left: `top_k` and their equals, then `top_p` of those."""
    ordered = sorted(scores, key=lambda token: (-scores[token], token))
    weights = {token: math.exp(scores[token]) for token in ordered if scores[token] >= scores[ordered[top_k - 1]]}
    total, kept = sum(weights.values()), {}
    for token, weight in weights.items():
        if sum(kept.values()) < top_p * total:
            kept[token] = weight
    return {token: weight / sum(kept.values()) for token, weight in kept.items()}


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
