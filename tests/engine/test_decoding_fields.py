"""Fields of requests that change what is chosen or shown: limits on thoughts, plugins, named tokens, paced streams."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from served import Setup, served

from quire import LLM, SamplingParams
from quire.core.params import RequestOutputKind, ThinkingMarks
from quire.core.plan import Admission
from quire.errors import ConfigError, ValidationError
from quire.kernels import reference
from quire.kernels.table import ops_of
from quire.worker.batch import Rows
from quire.worker.device import Device
from quire.worker.processors import find_processors
from quire.worker.sampler import Sampler
from quire.worker.slots import Slots

VOCAB = 40
OPEN, CLOSE, MORE = 30, 31, 32


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    here = types.ModuleType("quire_test_plugin")
    here.only = _only  # type: ignore[attr-defined]
    sys.modules["quire_test_plugin"] = here
    with LLM(
        max_num_seqs=8,
        max_model_len=256,
        device="cpu",
        threads=1,
        kv_cache_memory_bytes=1 << 26,
        logits_processors=("quire_test_plugin:only",),
    ) as made:
        yield made


def _only(params: SamplingParams) -> Any:
    """A plugin: the token that a request names, in place of everything else; and one that fails."""
    wish = (params.extra_args or {}).get("only")
    if wish is None:
        return None

    def process(prompt: list[int], output: list[int], scores: torch.Tensor) -> torch.Tensor:
        if wish == "boom":
            raise RuntimeError("boom")
        scores[torch.arange(len(scores)) != wish + len(output)] = float("-inf")
        return scores

    return process


class Thinker:
    """The sampler beside one request whose model always wants token 7."""

    def __init__(self, budget: int, marks: ThinkingMarks, prompt: tuple[int, ...]) -> None:
        self.slots = Slots(2, 100, (), Device("cpu"))
        self.sampler = Sampler(self.slots, ops_of(reference), Device("cpu"), "raw_logprobs")
        params = SamplingParams(temperature=0.0, thinking_token_budget=budget).resolved(thinking=marks)
        self.tokens = list(prompt)
        self.prompt = len(prompt)
        self.slots.admit(Admission(1, "r", prompt, len(prompt), params, 0))
        self.sampler.admit(Admission(1, "r", prompt, len(prompt), params, 0))

    def say(self, count: int, forced: tuple[int, ...] = ()) -> list[int]:
        """`count` further tokens, of which the model wants `forced` first."""
        for index in range(count):
            logits = torch.zeros(1, VOCAB)
            logits[0, forced[index] if index < len(forced) else 7] = 5.0
            host, ends = np.array([1]), np.array([len(self.tokens)])
            rows = Rows([0], None, host, ends, torch.from_numpy(host), torch.from_numpy(ends))
            [token] = self.sampler.choose(logits, rows).tokens_host
            self.slots.tokens[1, len(self.tokens)] = token
            self.tokens.append(token)
        return self.tokens[self.prompt :]


MARKS = ThinkingMarks(opener=(OPEN,), closers=((CLOSE, MORE),))


@pytest.mark.parametrize(
    ("budget", "prompt", "wanted", "expected"),
    [
        (3, (1, OPEN), (), [7, 7, 7, CLOSE, MORE, 7, 7, 7]),
        (0, (1, OPEN, 2), (), [CLOSE, MORE, 7, 7, 7, 7, 7, 7]),
        (3, (1, OPEN), (8, CLOSE, MORE), [8, CLOSE, MORE, 7, 7, 7, 7, 7]),
        (2, (1, OPEN), (8, CLOSE), [8, CLOSE, MORE, 7, 7, 7, 7, 7]),  # the mark that the model began is ended
        (2, (1, OPEN, 2, CLOSE, MORE), (), [7] * 8),  # the prompt has closed it
        (2, (1, 2), (), [7] * 8),  # no thought was begun
        (2, (1, 2), (8, OPEN), [8, OPEN, 7, 7, CLOSE, MORE, 7, 7]),
    ],
)
def test_thoughts_end_with_their_budget(
    budget: int, prompt: tuple[int, ...], wanted: tuple[int, ...], expected: list[int]
) -> None:
    assert Thinker(budget, MARKS, prompt).say(8, wanted) == expected


def test_a_rejected_end_of_thoughts_is_forgotten() -> None:
    thinker = Thinker(3, MARKS, (1, OPEN))
    assert thinker.say(6)[-1] == 7
    del thinker.tokens[-4:]  # as when drafts are rejected: the mark was never said
    assert thinker.say(1, (9,))[-1] == 9
    assert thinker.say(2)[-2:] == [CLOSE, MORE]


def test_marks_are_implied_where_the_model_has_none_in_the_prompt() -> None:
    marks = ThinkingMarks(opener=(OPEN,), closers=((CLOSE,),), implied=True)
    assert Thinker(2, marks, (1,)).say(4) == [7, 7, CLOSE, 7]


def test_a_budget_needs_to_know_the_marks(llm: LLM) -> None:
    with pytest.raises(ValidationError, match="thinking_token_budget needs"):
        llm.generate("a", SamplingParams(thinking_token_budget=5), use_tqdm=False)


def test_named_tokens_are_reported(llm: LLM) -> None:
    ids = [5, 900, 17]
    best = llm.generate("Once", SamplingParams(max_tokens=4, temperature=0, logprobs=20), use_tqdm=False)[0].outputs[0]
    named = llm.generate("Once", SamplingParams(max_tokens=4, temperature=0, logprob_token_ids=ids), use_tqdm=False)
    found = named[0].outputs[0]
    assert found.token_ids == best.token_ids
    for token, entry, top in zip(found.token_ids, found.logprobs or [], best.logprobs or [], strict=True):
        assert list(entry)[0] == token and set(entry) == {token, *ids}
        assert entry[token].logprob == top[token].logprob and entry[token].rank == top[token].rank
        for other in ids:
            assert entry[other].rank == (top[other].rank if other in top else entry[other].rank)
            assert entry[other].rank > 20 or entry[other].logprob == top[other].logprob


def test_a_plugin_changes_the_scores_of_those_who_ask(llm: LLM) -> None:
    params = [
        SamplingParams(max_tokens=3, temperature=0, ignore_eos=True),
        SamplingParams(max_tokens=3, temperature=0, ignore_eos=True, extra_args={"only": 100}),
        SamplingParams(max_tokens=3, temperature=0, extra_args={"only": "boom"}),
    ]
    plain, chosen, failed = (found.outputs[0] for found in llm.generate(["a"] * 3, params, use_tqdm=False))
    assert chosen.token_ids == [100, 101, 102]
    assert plain.token_ids == llm.generate("a", params[0], use_tqdm=False)[0].outputs[0].token_ids
    assert failed.finish_reason == "error" and "boom" in (failed.error or "")


def test_plugins_that_are_not_there_are_named() -> None:
    for path in ("quire_nothing:there", "json:nothing", "json:__name__"):
        with pytest.raises(ConfigError, match=path):
            find_processors([path])
    assert find_processors(["json:loads"]) == (json.loads,)


@pytest.mark.parametrize("kind", [RequestOutputKind.DELTA, RequestOutputKind.CUMULATIVE])
def test_a_stream_brings_several_tokens_at_a_time(llm: LLM, kind: RequestOutputKind) -> None:
    params = SamplingParams(max_tokens=8, n=2, seed=3, ignore_eos=True, logprobs=0, output_kind=kind, stream_interval=3)
    whole = llm.generate("Once", params, use_tqdm=False)[0].outputs
    engine = llm._engine
    engine.add("paced", "Once", params)
    seen: dict[int, list[list[int]]] = {0: [], 1: []}
    texts = {0: "", 1: ""}
    while engine.has_work():
        for output in engine.step():
            for part in output.outputs:
                seen[part.index].append(part.token_ids)
                assert len(part.logprobs or []) == len(part.token_ids)
                texts[part.index] = texts[part.index] + part.text if kind == 1 else part.text
    for index, found in enumerate(whole):
        sizes = [1, 3, 3, 1] if kind == 1 else [1, 4, 7, 8]
        assert [len(tokens) for tokens in seen[index]] == sizes
        assert texts[index] == found.text


def test_fields_over_http() -> None:
    with served(Setup()) as server:

        def post(**fields: Any) -> dict[str, Any]:
            body = {"prompt": "say:hello;|", "max_tokens": 8} | fields
            return server.http.post("/v1/completions", json=body).json()

        assert post(logprob_token_ids=[70])["error"]["param"] == "logprob_token_ids"
        assert post(thinking_token_budget=3)["error"]["param"] == "thinking_token_budget"
        assert post(vllm_xargs={"a": 1, "b": [2, "c"]})["choices"][0]["text"] == "hello"
