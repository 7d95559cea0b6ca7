"""The sampler row by row: each step against its definition, its cost for rows that do not use it, rows that fail."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from quire.core.params import SamplingParams
from quire.core.plan import Admission, TokenLogprobs
from quire.kernels import reference
from quire.kernels.table import ops_of
from quire.worker.batch import PromptRows, Rows
from quire.worker.device import Device
from quire.worker.sampler import Choices, Sampler
from quire.worker.slots import Slots

VOCAB = 50


class Bench:
    """A sampler with requests in its rows; row i has tokens[i], of which the first prompt_lens[i] are the prompt."""

    def __init__(self, mode: str = "raw_logprobs") -> None:
        self.device = Device("cpu")
        self.slots = Slots(16, 100, (), self.device)
        self.sampler = Sampler(self.slots, ops_of(reference), self.device, mode)
        self.lengths: dict[int, int] = {}

    def admit(self, slot: int, params: SamplingParams, tokens=(1, 2, 3), prompt_len: int = 3, seed: int = 5) -> None:
        new = Admission(slot, f"r{slot}", tuple(tokens), prompt_len, params, seed)
        self.slots.admit(new)
        self.sampler.admit(new)
        self.lengths[slot] = len(tokens)

    def choose(self, logits: torch.Tensor, slots: list[int]) -> Choices:
        return self.sampler.choose(logits, self.rows(slots))

    def rows(self, slots: list[int]) -> Rows:
        host = np.array(slots)
        ends = np.array([self.lengths[slot] for slot in slots])
        return Rows(list(range(len(slots))), None, host, ends, torch.from_numpy(host), torch.from_numpy(ends))


GREEDY = {"temperature": 0.0}


def noise(rows: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed))


def test_greedy_takes_the_first_of_equals():
    bench = Bench()
    bench.admit(0, SamplingParams(**GREEDY))
    logits = torch.zeros(1, VOCAB)
    logits[0, [7, 9]] = 4.0
    assert bench.choose(logits, [0]).tokens_host == [7]


def test_allowed_token_ids_leave_only_themselves():
    bench = Bench()
    bench.admit(0, SamplingParams(**GREEDY, allowed_token_ids=[3, 11]))
    logits = torch.arange(VOCAB).float()[None]
    assert bench.choose(logits, [0]).tokens_host == [11]
    assert logits[0, 49] == 49.0  # the model's logits are left as they are


@pytest.mark.parametrize(
    ("output", "expected"),
    [((), 49), ((4,), 49), ((4, 5), 48), ((5, 4), 49), ((5,), 49)],
)
def test_bad_words_forbid_the_end_of_a_sequence_in_the_output_only(output, expected):
    bench = Bench()
    params = SamplingParams(**GREEDY).resolved(bad_words_token_ids=[(4, 5, 49)])
    bench.admit(0, params, tokens=(9, 4, 5, *output), prompt_len=3)
    assert bench.choose(torch.arange(VOCAB).float()[None], [0]).tokens_host == [expected]


def test_bad_word_of_one_token_is_never_chosen():
    bench = Bench()
    bench.admit(0, SamplingParams(**GREEDY).resolved(bad_words_token_ids=[(49,), (48,)]))
    assert bench.choose(torch.arange(VOCAB).float()[None], [0]).tokens_host == [47]


@pytest.mark.parametrize(("generated", "expected"), [(0, 46), (1, 46), (2, 49)])
def test_min_tokens_forbid_every_end(generated, expected):
    bench = Bench()
    params = SamplingParams(**GREEDY, min_tokens=2, stop_token_ids=[48, 47], ignore_eos=True)
    bench.admit(0, params.resolved(eos_token_ids=[49]), tokens=(1, 2, 3, *[5] * generated))
    assert bench.choose(torch.arange(VOCAB).float()[None], [0]).tokens_host == [expected]


def test_logit_bias_is_added():
    bench = Bench()
    bench.admit(0, SamplingParams(**GREEDY, logit_bias={7: 60.0, 49: -100.0}))
    assert bench.choose(torch.arange(VOCAB).float()[None], [0]).tokens_host == [7]


def penalized(logits: torch.Tensor, prompt, output, params: SamplingParams) -> torch.Tensor:
    """The definition, token by token."""
    scores = logits.clone()
    for token in set(prompt) | set(output):
        value = scores[token]
        scores[token] = value / params.repetition_penalty if value > 0 else value * params.repetition_penalty
    for token in set(output):
        scores[token] -= params.frequency_penalty * list(output).count(token) + params.presence_penalty
    return scores


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(**GREEDY, repetition_penalty=1.7),
        SamplingParams(**GREEDY, presence_penalty=0.9),
        SamplingParams(**GREEDY, frequency_penalty=-0.7),
        SamplingParams(**GREEDY, repetition_penalty=0.6, presence_penalty=0.5, frequency_penalty=0.3),
    ],
)
def test_penalties_follow_their_definition(params):
    bench = Bench()
    texts = {0: ((1, 2, 3), (5, 5, 6)), 3: ((4, 4), ()), 5: ((9, 8, 7, 6), (6, 6, 6, 9, 2))}
    for slot, (prompt, output) in texts.items():
        bench.admit(slot, params, (*prompt, *output), len(prompt))
    bench.admit(7, SamplingParams(**GREEDY), (1, 1, 1), 1)
    logits = noise(4, seed=3)
    found = bench.sampler._processed(logits, bench.rows([5, 7, 0, 3]))
    for row, slot in enumerate([5, 7, 0, 3]):
        expected = logits[row] if slot == 7 else penalized(logits[row], *texts[slot], params)
        torch.testing.assert_close(found[row], expected)


def test_a_step_that_nobody_uses_is_not_run():
    bench = Bench()
    bench.admit(0, SamplingParams(temperature=0.7, top_p=0.9))
    bench.admit(1, SamplingParams(**GREEDY, logit_bias={3: 1.0}))
    for step in bench.sampler._steps:
        step.apply = None  # to call it would raise
    bench.choose(noise(), [0])
    with pytest.raises(TypeError):
        bench.choose(noise(2), [0, 1])
    bench.sampler.release(1)
    bench.admit(1, SamplingParams(**GREEDY))
    bench.choose(noise(2), [0, 1])


def test_a_row_draws_the_same_alone_and_among_others():
    alone, together = Bench(), Bench()
    logits = noise(12, seed=9) * 3
    wishes = [
        SamplingParams(temperature=0.3 + 0.1 * i, top_k=i * 3, top_p=1 - 0.05 * (i % 4), min_p=0.01 * (i % 3))
        for i in range(12)
    ]
    for slot, params in enumerate(wishes):
        alone.admit(slot, params, seed=slot * 17)
        together.admit(slot, params, seed=slot * 17)
    single = [alone.choose(logits[slot : slot + 1], [slot]).tokens_host[0] for slot in range(12)]
    order = [5, 2, 11, 0, 1, 3, 4, 10, 9, 8, 7, 6]
    assert together.choose(logits[order], order).tokens_host == [single[slot] for slot in order]


def test_sampling_follows_the_probabilities():
    bench = Bench()
    bench.admit(0, SamplingParams(temperature=0.5, top_k=3), seed=11)
    logits = torch.full((1, VOCAB), -5.0)
    logits[0, [4, 8, 15, 16]] = torch.tensor([1.0, 0.8, 0.5, 0.2])
    found = []
    for position in range(3, 1003):
        bench.lengths[0] = position
        found.append(bench.choose(logits, [0]).tokens_host[0])
    weights = torch.softmax(torch.tensor([1.0, 0.8, 0.5]) / 0.5, dim=0).tolist()
    for token, weight in zip([4, 8, 15], weights, strict=True):
        assert abs(found.count(token) / 1000 - weight) < 4 * math.sqrt(weight * (1 - weight) / 1000)
    assert set(found) == {4, 8, 15}


# ---------------------------------------------------------------- log-probabilities


def test_logprobs_start_with_the_chosen_token():
    bench = Bench()
    bench.admit(0, SamplingParams(**GREEDY, logprobs=2, logit_bias={30: 100.0}))
    logits = noise(seed=1)
    entry = bench.choose(logits, [0]).logprobs[0]
    expected = torch.log_softmax(logits[0], dim=-1)
    best = expected.topk(2)
    assert entry.token_ids == (30, *best.indices.tolist())
    assert entry.logprobs == pytest.approx([expected[30].item(), *best.values.tolist()])
    assert entry.ranks == (int((expected >= expected[30]).sum()), 1, 2)


def test_ties_push_the_rank_up():
    bench = Bench()
    bench.admit(0, SamplingParams(**GREEDY, logprobs=0))
    assert bench.choose(torch.zeros(1, VOCAB), [0]).logprobs[0] == TokenLogprobs(
        (0,), (pytest.approx(-math.log(VOCAB)),), (VOCAB,)
    )


def test_rows_without_logprobs_have_none_and_all_means_all():
    bench = Bench()
    bench.admit(0, SamplingParams(**GREEDY))
    bench.admit(1, SamplingParams(**GREEDY, logprobs=-1))
    found = bench.choose(noise(2), [0, 1]).logprobs
    assert set(found) == {1}
    assert len(found[1].token_ids) == VOCAB + 1


@pytest.mark.parametrize("mode", ["raw_logits", "processed_logits", "processed_logprobs"])
def test_logprobs_modes(mode):
    bench = Bench(mode)
    bench.admit(0, SamplingParams(temperature=0.5, top_k=2, logprobs=3, logit_bias={1: 5.0}))
    logits = noise(seed=2)
    entry = bench.choose(logits, [0]).logprobs[0]
    if mode == "raw_logits":
        assert entry.logprobs[1:] == pytest.approx(logits[0].topk(3).values.tolist())
        return
    changed = logits[0].clone()
    changed[1] += 5.0
    kept = (changed / 0.5).topk(2)
    values = kept.values if mode == "processed_logits" else torch.log_softmax(kept.values, dim=-1)
    assert entry.token_ids[1:3] == tuple(kept.indices.tolist())
    assert entry.logprobs[1:] == pytest.approx([*values.tolist(), -math.inf])


def test_processed_logprobs_agree_with_the_draw():
    bench = Bench("processed_logprobs")
    params = SamplingParams(temperature=0.8, top_p=0.6, min_p=0.05, top_k=20, logprobs=0)
    for slot in range(16):
        bench.admit(slot, params, seed=slot)
    found = bench.choose(noise(16, seed=4) * 2, list(range(16))).logprobs
    assert all(math.isfinite(entry.logprobs[0]) for entry in found.values())


def test_prompt_logprobs_are_those_of_the_next_tokens():
    bench = Bench()
    bench.admit(2, SamplingParams(prompt_logprobs=1), tokens=(4, 9, 6, 30), prompt_len=4)
    logits = noise(5, seed=6)
    found = bench.sampler.prompt_logprobs(logits, PromptRows(span=0, slot=2, start=1, first=2, count=2))
    expected = torch.log_softmax(logits, dim=-1)
    assert [entry.token_ids[0] for entry in found] == [6, 30]
    assert [entry.logprobs[0] for entry in found] == pytest.approx([expected[2, 6].item(), expected[3, 30].item()])


# ---------------------------------------------------------------- rows that fail


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_row_without_usable_scores_fails_alone(poison):
    bench = Bench()
    bench.admit(0, SamplingParams(temperature=0.9), seed=1)
    bench.admit(1, SamplingParams(**GREEDY))
    bench.admit(2, SamplingParams(temperature=0.9), seed=3)
    logits = noise(3)
    healthy = bench.choose(logits, [0, 1, 2]).tokens_host
    logits[1, 20] = poison
    found = bench.choose(logits, [0, 1, 2])
    assert found.tokens_host == [healthy[0], -1, healthy[2]]
    assert "NaN" in str(bench.sampler.explain(logits[1]))


def test_a_row_with_every_token_forbidden_fails_with_the_reason():
    bench = Bench()
    bench.admit(0, SamplingParams(**GREEDY, allowed_token_ids=[3]).resolved(bad_words_token_ids=[(3,)]))
    logits = noise()
    assert bench.choose(logits, [0]).tokens_host == [-1]
    assert "forbid" in str(bench.sampler.explain(logits[0]))
