"""Parameters in any combination, drawn at random: what must hold of every answer, streamed or not, alone or together.

`python tests/engine/test_combinations.py 500` tries so many requests.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from quire import LLM, SamplingParams
from quire.core.params import RequestOutputKind, ThinkingMarks
from quire.engine.outputs import CompletionOutput, RequestOutput

SETTINGS = {"device": "cpu", "threads": 1, "kv_cache_memory_bytes": 1 << 27, "max_model_len": 160, "max_num_seqs": 16}
PROMPTS = [
    "Once upon a time",
    "The old man went to the",
    "a b c a b c a b",
    "It was a dark night, and the captain said",
]
# Not adaptive: whether guessing pays depends on the machine.
NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_max": 3,
    "prompt_lookup_min": 1,
    "adaptive": False,
}
OPEN, CLOSE = 40, 41
FORMS: list[dict[str, Any]] = [
    {"choice": ["a long walk", "a house by the sea", "no"]},
    {"regex": "[a-z]{2,9}( [a-z]{1,5}){0,3}\\."},
    {"json_object": True},
    {"json": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}},
]
SOME = tuple(range(5, 4000, 3))  # tokens


def drawn(chance: random.Random) -> SamplingParams:
    """Parameters that may stand together."""

    def maybe(share: float) -> bool:
        return chance.random() < share

    wishes: dict[str, Any] = {"temperature": chance.choice([0.0, 0.6, 1.0, 1.6]), "seed": chance.randrange(2**40)}
    wishes["max_tokens"] = chance.randrange(1, 24)
    if wishes["temperature"] > 0:
        wishes["n"] = chance.choice([1, 1, 2, 3])
        wishes |= {"top_p": chance.uniform(0.3, 1.0)} if maybe(0.3) else {}
        wishes |= {"top_k": chance.randrange(1, 60)} if maybe(0.3) else {}
        wishes |= {"min_p": chance.uniform(0.0, 0.3)} if maybe(0.3) else {}
    for name, low in (("presence_penalty", -1.0), ("frequency_penalty", -1.0), ("repetition_penalty", 0.6)):
        wishes |= {name: chance.uniform(low, 1.8)} if maybe(0.25) else {}
    wishes |= {"min_tokens": chance.randrange(wishes["max_tokens"] + 1)} if maybe(0.3) else {}
    wishes |= {"ignore_eos": True} if maybe(0.3) else {}
    wishes |= {"stop_token_ids": chance.sample(range(5, 900), 12)} if maybe(0.3) else {}
    if maybe(0.4):
        wishes["stop"] = chance.sample(["the", " a", "e ", "\n", ". ", "in", "zq"], 2)
        wishes["include_stop_str_in_output"] = maybe(0.5)
    elif maybe(0.15):
        wishes["detokenize"] = False
    wishes |= {"logit_bias": {token: chance.uniform(-5, 5) for token in chance.sample(SOME, 9)}} if maybe(0.3) else {}
    wishes |= {"bad_words": chance.sample(["the", "and", "was", " he"], 2)} if maybe(0.3) else {}
    if maybe(0.25):
        wishes["structured_outputs"] = chance.choice(FORMS)
    elif maybe(0.25):
        wishes["allowed_token_ids"] = chance.sample(SOME, 300)
    elif maybe(0.25):
        wishes["thinking_token_budget"] = chance.randrange(5)
        wishes["thinking"] = ThinkingMarks(opener=(OPEN,), closers=((CLOSE,),), implied=maybe(0.5))
    wishes |= {"repetition_detection": {"max_pattern_size": 3}} if maybe(0.2) else {}
    wishes |= _reports(chance)
    return SamplingParams(**wishes)


def _reports(chance: random.Random) -> dict[str, Any]:
    """What an answer shall tell beside its text."""
    found: dict[str, Any] = {}
    if chance.random() < 0.5:
        found["logprobs"] = chance.choice([0, 1, 4])
    elif chance.random() < 0.3:
        found["logprob_token_ids"] = chance.sample(SOME, 3)
    if chance.random() < 0.3:
        found["prompt_logprobs"] = chance.choice([0, 2])
    if chance.random() < 0.2:
        found["prompt_logprob_token_ids"] = chance.sample(SOME, 2)
    if chance.random() < 0.3:
        found["flat_logprobs"] = True
    if chance.random() < 0.3:
        found["stream_interval"] = chance.randrange(1, 6)
    return found


class Streamed:
    """A completion put together from what a stream brought."""

    def __init__(self) -> None:
        self.text = ""
        self.token_ids: list[int] = []
        self.logprobs: list[Any] = []
        self.last: CompletionOutput | None = None

    def take(self, part: CompletionOutput, kind: RequestOutputKind) -> None:
        if kind is RequestOutputKind.CUMULATIVE:
            assert part.text.startswith(self.text) and part.token_ids[: len(self.token_ids)] == self.token_ids
            self.text, self.token_ids, self.logprobs = "", [], []
        assert self.last is None or self.last.finish_reason is None, "nothing comes behind the end"
        self.text += part.text
        self.token_ids = self.token_ids + part.token_ids
        self.logprobs = self.logprobs + list(part.logprobs or [])
        self.last = part


def streamed(
    llm: LLM, prompts: list[str], wishes: list[SamplingParams], kind: RequestOutputKind
) -> list[list[Streamed]]:
    """All requests at once, as streams."""
    engine = llm._engine
    found = [[Streamed() for _ in range(params.n)] for params in wishes]
    for number, (prompt, params) in enumerate(zip(prompts, wishes, strict=True)):
        engine.add(f"{kind.name}-{number}", prompt, replace(params, output_kind=kind))
    while engine.has_work():
        for output in engine.step():
            number = int(output.request_id.rpartition("-")[2])
            for part in output.outputs:
                found[number][part.index].take(part, kind)
    return found


def told(found: CompletionOutput) -> tuple[Any, ...]:
    """Everything that an answer says."""
    return (
        found.text,
        list(found.token_ids),
        found.finish_reason,
        found.stop_reason,
        found.cumulative_logprob,
        None if found.logprobs is None else list(found.logprobs),
    )


def check_streams(whole: RequestOutput, parts: list[Streamed]) -> None:
    """A stream says what the whole answer says."""
    for found, part in zip(whole.outputs, parts, strict=True):
        assert part.last is not None
        text, tokens, reason, stop, total, logprobs = told(found)
        assert (part.text, part.token_ids, part.last.finish_reason, part.last.stop_reason) == (
            text,
            tokens,
            reason,
            stop,
        )
        assert part.last.cumulative_logprob == total
        assert part.logprobs == (logprobs or [])


def check_answer(llm: LLM, params: SamplingParams, whole: RequestOutput) -> None:
    """What must hold of any answer."""
    assert whole.finished and [found.index for found in whole.outputs] == list(range(params.n))
    length = len(whole.prompt_token_ids)
    assert (whole.prompt_logprobs is None) == (params.prompt_logprobs is None)
    if whole.prompt_logprobs is not None:
        assert len(whole.prompt_logprobs) == length and whole.prompt_logprobs[0] is None
        for token, entry in zip(whole.prompt_token_ids[1:], whole.prompt_logprobs[1:], strict=True):
            assert entry is not None and next(iter(entry)) == token
            assert len(entry) in (params.prompt_logprobs, (params.prompt_logprobs or 0) + 1)
    if params.prompt_logprob_token_ids is not None:
        rows = whole.prompt_token_id_logprobs
        assert rows is not None and [len(row) for row in rows] == [2] * (length - 1)
    for found in whole.outputs:
        check_completion(llm, params, found)


def check_completion(llm: LLM, params: SamplingParams, found: CompletionOutput) -> None:
    """What must hold of one of its completions."""
    tokens, reason, stop = found.token_ids, found.finish_reason, found.stop_reason
    assert params.max_tokens is not None and 1 <= len(tokens) <= params.max_tokens
    assert reason in ("stop", "length", "repetition"), found.error
    assert (reason == "length") <= (len(tokens) == params.max_tokens)
    eos = llm._engine.settings.eos_token_ids
    if reason == "stop" and isinstance(stop, str):
        assert stop in params.stop and found.text.endswith(stop) == params.include_stop_str_in_output or not found.text
    elif reason == "stop":
        assert tokens[-1] in (eos if stop is None else (stop,)) and (
            stop is None or stop in {*params.stop_token_ids, *eos}
        )
        assert not (params.ignore_eos and stop is None) or params.structured_outputs is not None
    if reason == "stop" and params.structured_outputs is None:
        assert len(tokens) > params.min_tokens
    if params.allowed_token_ids is not None:
        assert set(tokens) <= set(params.allowed_token_ids)
    if params.thinking is not None and params.thinking.implied and len(tokens) > (params.thinking_token_budget or 0):
        assert CLOSE in tokens[: (params.thinking_token_budget or 0) + 1]
    assert (found.logprobs is None) == (params.logprobs is None) == (found.cumulative_logprob is None)
    if found.logprobs is not None:
        assert len(found.logprobs) == len(tokens)
        total = 0.0
        for token, entry in zip(tokens, found.logprobs, strict=True):
            assert entry is not None and next(iter(entry)) == token
            named = params.logprob_token_ids
            assert (
                set(entry) == {token, *named} if named else len(entry) in (params.logprobs, (params.logprobs or 0) + 1)
            )
            total += entry[token].logprob
        assert found.cumulative_logprob == pytest.approx(total, abs=1e-4)


def tried(llm: LLM, number: int, count: int) -> None:
    """So many requests of this number's draw, in every way."""
    chance = random.Random(number)
    prompts = [chance.choice(PROMPTS) for _ in range(count)]
    wishes = [drawn(chance) for _ in range(count)]
    wholes = llm.generate(prompts, wishes, use_tqdm=False)
    for params, whole in zip(wishes, wholes, strict=True):
        check_answer(llm, params, whole)
    for kind in (RequestOutputKind.DELTA, RequestOutputKind.CUMULATIVE):
        for whole, parts in zip(wholes, streamed(llm, prompts, wishes, kind), strict=True):
            check_streams(whole, parts)
    singles = [
        (prompt, replace(params, n=1, seed=(params.seed or 0) + index), found)
        for prompt, params, whole in zip(prompts, wishes, wholes, strict=True)
        for index, found in enumerate(whole.outputs)
    ]
    again = llm.generate([prompt for prompt, _, _ in singles], [params for _, params, _ in singles], use_tqdm=False)
    for (_, params, found), single in zip(singles, again, strict=True):
        assert told(single.outputs[0]) == told(found), params


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(**SETTINGS) as made:
        yield made


@pytest.mark.parametrize("number", range(4))
def test_what_holds_of_every_combination(llm: LLM, number: int) -> None:
    tried(llm, number, 16)


def test_the_same_with_guesses_and_little_room(llm: LLM) -> None:
    """Guesses, prompts in pieces and few pages, so that requests give theirs back, change no answer."""
    chance = random.Random(99)
    prompts = [chance.choice(PROMPTS) for _ in range(16)]
    wishes = [drawn(chance) for _ in range(16)]
    wanted = llm.generate(prompts, wishes, use_tqdm=False)
    narrow = {"num_gpu_blocks_override": 6, "max_model_len": 64, "max_num_batched_tokens": 16}
    with LLM(**SETTINGS | narrow | {"speculative_config": NGRAM}) as other:
        found = other.generate(prompts, wishes, use_tqdm=False)
        stats = other._engine.stats()
    for one, another in zip(wanted, found, strict=True):
        assert [told(item) for item in one.outputs] == [told(item) for item in another.outputs]
        assert list(one.prompt_logprobs or ()) == list(another.prompt_logprobs or ())
        assert one.prompt_token_id_logprobs == another.prompt_token_id_logprobs
    assert stats.preemptions > 0 and stats.draft_tokens > 0


if __name__ == "__main__":
    with LLM(**SETTINGS) as engine:
        for each in range(100, 100 + int(sys.argv[1]) // 16):
            tried(engine, each, 16)
            print(each, "holds", flush=True)
