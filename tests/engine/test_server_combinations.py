"""Fields of the two routes in any combination, drawn at random: a stream says what the whole answer says."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from served_model import served_model

PROMPTS = ["Once upon a time", "The old man went to the", [5, 300, 17, 900], ["a b c", "It was a dark night"]]
TALK = [{"role": "user", "content": "Tell me a story."}]
CHOICES = {"structured_outputs": {"choice": ["a long walk", "a house"]}}
SOME = list(range(5, 4000, 7))
PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}


@pytest.fixture(scope="module")
def server() -> Iterator[httpx.Client]:
    with served_model() as client:
        yield client


def drawn(chance: random.Random, route: str) -> dict[str, Any]:
    """A body without `stream`."""

    def maybe(share: float) -> bool:
        return chance.random() < share

    body: dict[str, Any] = {
        "seed": chance.randrange(2**40),
        "max_tokens": chance.randrange(1, 16),
        "return_token_ids": True,
    }
    body["temperature"] = chance.choice([0, 0.7, 1.2])
    if body["temperature"]:
        body["n"] = chance.choice([1, 2, 3])
    body |= {"top_p": chance.uniform(0.4, 1.0), "top_k": chance.randrange(40)} if maybe(0.4) else {}
    body |= {"presence_penalty": chance.uniform(-1, 1), "repetition_penalty": 1.2} if maybe(0.3) else {}
    body |= {"min_tokens": chance.randrange(body["max_tokens"] + 1)} if maybe(0.3) else {}
    body |= (
        {"stop": chance.sample([" a", "e ", ". ", "the", "\n"], 2), "include_stop_str_in_output": maybe(0.5)}
        if maybe(0.5)
        else {}
    )
    body |= {"logit_bias": {str(token): 4.0 for token in chance.sample(SOME, 5)}} if maybe(0.3) else {}
    body |= {"bad_words": ["the", "and"]} if maybe(0.3) else {}
    body |= {"ignore_eos": True} if maybe(0.3) else {}
    body |= {"stream_interval": chance.randrange(1, 5)} if maybe(0.3) else {}
    if maybe(0.2):
        body |= CHOICES
    elif maybe(0.3):
        body["allowed_token_ids"] = SOME
    if route == "chat":
        body["messages"] = TALK
        body |= {"logprobs": True, "top_logprobs": chance.randrange(4)} if maybe(0.5) else {}
    else:
        body["prompt"] = chance.choice(PROMPTS)
        body |= {"logprobs": chance.randrange(4)} if maybe(0.5) else {}
        body |= {"echo": True} if maybe(0.4) else {}
        body |= {"max_tokens": 0, "min_tokens": 0} if body.get("echo") and maybe(0.2) else {}
    return body


def streamed(server: httpx.Client, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The events of a stream."""
    wish = {"stream": True, "stream_options": {"include_usage": True}}
    with server.stream("POST", path, json=body | wish) as response:
        assert response.status_code == 200, response.read()
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def joined(events: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """What the chunks bring, by the number of the choice."""
    found: dict[int, dict[str, Any]] = {}
    for event in events:
        for choice in event["choices"]:
            one = found.setdefault(
                choice["index"], {"text": "", "tokens": [], "logprobs": [], "finish": None, "stop": None}
            )
            assert one["finish"] is None, "nothing comes behind the end"
            delta = choice.get("delta", {})
            one["text"] += choice["text"] if "text" in choice else delta.get("content") or ""
            one["tokens"] += choice.get("token_ids") or []
            one["logprobs"] += entries(choice["logprobs"])
            one["finish"], one["stop"] = choice["finish_reason"], choice.get("stop_reason")
    return found


def entries(logprobs: dict[str, Any] | None) -> list[Any]:
    """One entry for each token, of either route."""
    if logprobs is None:
        return []
    if "content" in logprobs:
        return list(logprobs["content"])
    names = ("tokens", "token_logprobs", "text_offset", "top_logprobs")
    assert len({len(logprobs[name]) for name in names}) == 1
    return list(zip(*(logprobs[name] for name in names), strict=True))


@pytest.mark.parametrize("route", PATHS)
@pytest.mark.parametrize("number", range(16))
def test_a_stream_says_what_the_whole_answer_says(server: httpx.Client, route: str, number: int) -> None:
    body = drawn(random.Random(f"{route} {number}"), route)
    whole = server.post(PATHS[route], json=body).raise_for_status().json()
    events = streamed(server, PATHS[route], body)
    parts = joined(events)
    prompts = 2 if isinstance(body.get("prompt"), list) and isinstance(body["prompt"][0], str) else 1
    assert [choice["index"] for choice in whole["choices"]] == list(range(prompts * body.get("n", 1))) == sorted(parts)
    shown = 0
    for choice in whole["choices"]:
        part = parts[choice["index"]]
        text = choice["text"] if "text" in choice else choice["message"]["content"]
        tokens = choice["token_ids"]
        assert (part["text"], part["finish"], part["stop"]) == (text, choice["finish_reason"], choice["stop_reason"])
        assert part["tokens"] == tokens and part["logprobs"] == entries(choice["logprobs"])
        shown += 0 if body["max_tokens"] == 0 else len(tokens)
        if choice["logprobs"] is not None:
            before = len(choice["prompt_token_ids"]) if body.get("echo") else 0
            said = 0 if body["max_tokens"] == 0 else len(tokens)
            assert len(entries(choice["logprobs"])) == before + said
        assert len(tokens) == max(body["max_tokens"], 1) or choice["finish_reason"] != "length"
    usage = whole["usage"]
    assert usage["completion_tokens"] == shown and usage["total_tokens"] == usage["prompt_tokens"] + shown
    assert events[-1]["choices"] == [] and events[-1]["usage"] == usage


def test_a_suffix_needs_a_model_that_fills_in(server: httpx.Client) -> None:
    for stream in (False, True):
        found = server.post("/v1/completions", json={"prompt": "a", "suffix": "b", "stream": stream})
        assert found.status_code == 400 and found.json()["error"]["param"] == "suffix"
