"""The first promise: a request's tokens are the same whoever else is there and however its steps were cut.

Bfloat16, sampled and greedy, down to the bits of the log-probabilities.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from tiny import VOCAB, write_tiny

from quire import LLM, SamplingParams
from quire.engine.prompts import TokensPrompt

COUNT = 64
PAGE = 16
BASE = {
    "max_num_seqs": COUNT,
    "max_model_len": 96,
    "block_size": PAGE,
    "kv_cache_memory_bytes": 1 << 26,
    "device": "cpu",
    "threads": 1,
}

# Each way of running all requests together, as options over BASE.
WAYS = {
    "batch of 64": {},
    "planned ahead": {"async_scheduling": True},
    "chunked": {"max_num_batched_tokens": 7, "max_num_seqs": 5},
    "odd chunks": {"max_num_batched_tokens": 64, "long_prefill_token_threshold": 5},
    "preempted": {"num_gpu_blocks_override": 24, "enable_prefix_caching": False},
    "preempted, with hits, ahead": {"num_gpu_blocks_override": 18, "async_scheduling": True},
}


@dataclass(frozen=True)
class Answer:
    """What must be the same: ids and the bits of their log-probabilities."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]


def make_requests() -> list[tuple[TokensPrompt, SamplingParams]]:
    """Prompts of 1 to 40 tokens, a third with the same beginning; every kind of choosing."""
    rng = random.Random(3)
    shared = [rng.randrange(3, VOCAB) for _ in range(36)]
    found = []
    for index in range(COUNT):
        own = [rng.randrange(3, VOCAB) for _ in range(rng.randint(1, 40))]
        ids = [*shared, *own[:10]] if index % 3 == 0 else own
        wish = {"max_tokens": rng.randint(3, 18), "ignore_eos": True, "logprobs": 1, "seed": index}
        if index % 4 == 0:
            wish["temperature"] = 0.0
        elif index % 4 == 1:
            wish |= {"temperature": 0.9, "top_p": 0.8}
        elif index % 4 == 2:
            wish |= {"temperature": 1.3, "top_k": 12, "repetition_penalty": 1.2, "frequency_penalty": 0.3}
        else:
            wish |= {"temperature": 0.7, "min_p": 0.05, "min_tokens": 2, "logit_bias": {7: 2.0}}
        found.append((TokensPrompt(prompt_token_ids=ids), SamplingParams(**wish)))
    return found


REQUESTS = make_requests()


def run(llm: LLM, requests: list[tuple[TokensPrompt, SamplingParams]]) -> list[Answer]:
    outputs = llm.generate([prompt for prompt, _ in requests], [params for _, params in requests], use_tqdm=False)
    found = []
    for output in outputs:
        completion = output.outputs[0]
        assert completion.error is None
        chosen = tuple(
            entry[token].logprob for token, entry in zip(completion.token_ids, completion.logprobs, strict=True)
        )
        found.append(Answer(tuple(completion.token_ids), chosen))
    return found


@dataclass(frozen=True)
class Model:
    """How to start a model, and what each request gets when it is alone."""

    options: dict[str, object]
    alone: list[Answer]


@pytest.fixture(
    scope="module",
    params=[("qwen3", "native"), ("mistral", "native"), ("gemma2", "transformers"), (None, "auto")],
    ids=["qwen3 native", "mistral native, window", "gemma2 transformers, both", "bundled"],
)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    family, impl = request.param
    options = {"model_impl": impl, "skip_tokenizer_init": True}
    if family is not None:
        folder = tmp_path_factory.mktemp("model") / family
        options["model"] = str(write_tiny(folder, family, dtype=torch.bfloat16, tokenizer=False))
    with LLM(**options, **BASE, enable_prefix_caching=False) as llm:
        yield Model(options, [run(llm, [item])[0] for item in REQUESTS])


def test_the_requests_are_worth_comparing(model):
    tokens = [answer.token_ids for answer in model.alone]
    assert len(set(tokens)) > 0.9 * COUNT
    assert sum(len(set(ids)) > len(ids) // 2 for ids in tokens) > COUNT // 2, "the model repeats itself"


@pytest.mark.parametrize("way", WAYS)
def test_together_as_alone(model, way):
    with LLM(**model.options, **{**BASE, **WAYS[way]}) as llm:
        found = run(llm, REQUESTS)
        stats = llm._engine.stats()
    assert found == model.alone
    if "preempted" in way:
        assert stats.preemptions > 0
    if "chunked" in way:
        # A third of the prompts begin alike and are found in the cache.
        assert stats.steps > 0.8 * sum(len(prompt["prompt_token_ids"]) for prompt, _ in REQUESTS) / 7


def test_in_another_order_and_after_a_prefix_hit(model):
    with LLM(**model.options, **BASE) as llm:
        order = random.Random(8).sample(range(COUNT), COUNT)
        first = run(llm, [REQUESTS[index] for index in order])
        assert first == [model.alone[index] for index in order]
        before = llm._engine.stats().cache_hits
        assert run(llm, REQUESTS) == model.alone
        assert llm._engine.stats().cache_hits - before > 15 * PAGE
