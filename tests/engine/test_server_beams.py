"""Beam search over HTTP: the sequences of LLM.beam_search on both routes, and wishes that a search cannot heed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from served_model import ENGINE, served_model

from quire import LLM, BeamSearchParams
from started_server import kill_engine, started_server
from waiting import until

PROMPT = "The old man went to the"
SCHEMA = {
    "type": "object",
    "properties": {"old": {"type": "boolean"}},
    "required": ["old"],
    "additionalProperties": False,
}
BEAMS = {"use_beam_search": True, "n": 3, "max_tokens": 12}


@pytest.fixture(scope="module")
def server() -> Iterator[httpx.Client]:
    with served_model(dtype="float32") as client:
        yield client


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(**ENGINE, dtype="float32") as made:
        yield made


@pytest.mark.parametrize(
    "wishes", [{}, {"length_penalty": 0.0}, {"early_stopping": True, "temperature": 0}, {"ignore_eos": True}]
)
def test_the_sequences_of_the_library(server: httpx.Client, llm: LLM, wishes: dict[str, Any]) -> None:
    body = {"prompt": [PROMPT, "Once upon"], "return_token_ids": True} | BEAMS | wishes
    answer = server.post("/v1/completions", json=body).raise_for_status().json()
    params = {name: value for name, value in wishes.items() if name != "temperature"}
    wanted = llm.beam_search([PROMPT, "Once upon"], BeamSearchParams(beam_width=3, max_tokens=12, **params))
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    sequences = [(sequence, output) for output in wanted for sequence in output.sequences]
    for choice, (sequence, _) in zip(answer["choices"], sequences, strict=True):
        tokens = choice["prompt_token_ids"] + choice["token_ids"]
        if choice["finish_reason"] == "stop":
            tokens = tokens[:-1]  # the end is a token of the output, and not of a sequence
        assert tokens == sequence.tokens
        assert choice["finish_reason"] == sequence.finish_reason
        prompt = PROMPT if choice["index"] < 3 else "Once upon"
        assert prompt + choice["text"] == sequence.text
    usage = answer["usage"]
    assert usage["completion_tokens"] == sum(len(choice["token_ids"]) for choice in answer["choices"])


def test_a_conversation_is_searched(server: httpx.Client) -> None:
    body = {"messages": [{"role": "user", "content": "Tell me a story."}]} | BEAMS
    answer = server.post("/v1/chat/completions", json=body).raise_for_status().json()
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    assert len(set(texts)) == 3 and all(texts)


@pytest.mark.parametrize(
    ("wish", "form"),
    [
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}},
            {"json": SCHEMA},
        ),
        ({"structured_outputs": {"regex": "[a-z]{1,4} [a-z]{1,4}!"}}, {"regex": "[a-z]{1,4} [a-z]{1,4}!"}),
        ({"guided_choice": ["mill", "river"]}, {"choice": ["mill", "river"]}),
    ],
)
def test_forms_are_kept(server: httpx.Client, llm: LLM, wish: dict[str, Any], form: dict[str, Any]) -> None:
    """By what the library finds; there are as many choices as it finds, which may be fewer than n."""
    fields = wish | BEAMS | {"n": 9, "max_tokens": 24}
    params = BeamSearchParams(beam_width=9, max_tokens=24, structured_outputs=form)
    wanted = [str(found.text)[len(PROMPT) :] for found in llm.beam_search(PROMPT, params)[0].sequences]
    answer = server.post("/v1/completions", json={"prompt": PROMPT} | fields).raise_for_status().json()
    assert [choice["text"] for choice in answer["choices"]] == wanted
    talk = {"messages": [{"role": "user", "content": "Name a place."}]}
    answer = server.post("/v1/chat/completions", json=talk | fields).raise_for_status().json()
    for choice in answer["choices"]:
        text = choice["message"]["content"]
        if choice["finish_reason"] == "stop":
            assert text in form.get("choice", [text]) and re.fullmatch(form.get("regex", "(?s).*"), text)
            assert "json" not in form or set(json.loads(text)) == {"old"}
    assert any(choice["finish_reason"] == "stop" for choice in answer["choices"])


def test_a_tool_is_called_by_every_beam(server: httpx.Client) -> None:
    tool = {"type": "function", "function": {"name": "look", "parameters": SCHEMA}}
    body = {
        "messages": [{"role": "user", "content": "Look."}],
        "tools": [tool],
        "tool_choice": {"type": "function", "function": {"name": "look"}},
    }
    answer = server.post("/v1/chat/completions", json=body | BEAMS | {"max_tokens": 60}).raise_for_status().json()
    calls = [choice["message"]["tool_calls"] for choice in answer["choices"]]
    assert len(calls) == 3 and all(set(json.loads(one["function"]["arguments"])) == {"old"} for [one] in calls)


def test_stops_and_echo(server: httpx.Client) -> None:
    plain = server.post("/v1/completions", json={"prompt": PROMPT, "return_token_ids": True} | BEAMS).json()
    stop = plain["choices"][0]["token_ids"][4]
    body = {"prompt": PROMPT, "stop_token_ids": [stop], "return_token_ids": True, "echo": True} | BEAMS
    answer = server.post("/v1/completions", json=body).raise_for_status().json()
    ended = [choice for choice in answer["choices"] if choice["stop_reason"] == stop]
    assert ended and all(choice["token_ids"][-1] == stop for choice in ended)
    assert all(choice["text"].startswith(PROMPT) for choice in answer["choices"])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"stream": True}, "stream"),
        ({"logprobs": 50}, "logprobs"),
        ({"top_p": 0.5}, "top_p"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"stop": "x"}, "stop"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs"),
        ({"repetition_penalty": 1.5}, "repetition_penalty"),
        ({"n": 20}, "beam_width"),
        ({"length_penalty": 1e9}, "length_penalty"),
        ({"use_beam_search": False, "length_penalty": 2.0}, "length_penalty"),
        ({"use_beam_search": False, "n": 1, "early_stopping": True}, "early_stopping"),
    ],
)
def test_what_a_search_cannot_heed_is_named(server: httpx.Client, fields: dict[str, Any], param: str) -> None:
    found = server.post("/v1/completions", json={"prompt": PROMPT} | BEAMS | fields)
    assert found.status_code == 400, found.text
    assert found.json()["error"]["param"] == param


def test_log_probabilities_of_a_search(server: httpx.Client) -> None:
    """Those that the model has for the same tokens when they are a prompt."""
    body = {"prompt": PROMPT, "logprobs": 2, "return_token_ids": True} | BEAMS
    choices = server.post("/v1/completions", json=body).raise_for_status().json()["choices"]
    for choice in choices:
        told, tokens = choice["logprobs"], choice["token_ids"]
        assert len(told["token_logprobs"]) == len(tokens) and all(2 <= len(best) <= 3 for best in told["top_logprobs"])
        prompt = choice["prompt_token_ids"] + tokens
        again = {"prompt": prompt, "max_tokens": 1, "prompt_logprobs": 0}
        found = server.post("/v1/completions", json=again).raise_for_status().json()["choices"][0]["prompt_logprobs"]
        expected = [next(iter(one.values()))["logprob"] for one in found[-len(tokens) :]]
        assert told["token_logprobs"] == pytest.approx(expected, abs=1e-4)
    body = {"messages": [{"role": "user", "content": "Tell me a story."}], "logprobs": True, "top_logprobs": 1} | BEAMS
    choice = server.post("/v1/chat/completions", json=body).raise_for_status().json()["choices"][0]
    assert all(len(one["top_logprobs"]) == 1 for one in choice["logprobs"]["content"])


def test_its_time_can_be_over(server: httpx.Client) -> None:
    """More rounds than any machine makes in a millisecond, whether or not each of them is quicker than that."""
    body = {"prompt": PROMPT, "timeout": 0.001, "ignore_eos": True} | BEAMS | {"max_tokens": 240}
    assert server.post("/v1/completions", json=body).status_code in (408, 429)
    assert server.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 2}).status_code == 200


@pytest.mark.slow
def test_a_search_outlives_its_engine() -> None:
    """Beams go on in another engine process, each where it was in its form, and find the same."""
    form = {"structured_outputs": {"regex": "([a-z]{1,7}[ ,]){60,80}"}}
    body = {"prompt": PROMPT} | form | BEAMS | {"max_tokens": 150}
    with (
        started_server("--max-model-len", "256", "--dtype", "float32", rows=8, threads=1) as server,
        httpx.Client(base_url=server.url, timeout=120) as client,
        ThreadPoolExecutor(1) as beside,
    ):

        def generated() -> float:
            found = re.search(r"^quire:generation_tokens_total\{.*\} (.*)$", client.get("/metrics").text, re.MULTILINE)
            return float(found[1]) if found else 0.0

        wanted = client.post("/v1/completions", json=body).raise_for_status().json()["choices"]
        before = generated()
        found = beside.submit(client.post, "/v1/completions", json=body)
        until(lambda: generated() > before + 30 or found.done())
        kill_engine(server.process.pid)
        choices = found.result().raise_for_status().json()["choices"]
    assert [choice["text"] for choice in choices] == [choice["text"] for choice in wanted]
