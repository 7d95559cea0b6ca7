"""What clients see when their requests are wrong, and that nobody else notices."""

from __future__ import annotations

import json
import logging
from typing import Any

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from served import CHAT, HELLO, MAX_MODEL_LEN, Running, refused

from quire.serve.fields import REFUSED, ApiRequest, _note_unknown
from quire.serve.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": 3}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": 0, "n": 2}, "n"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 2**40}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"n": 0}, "n"),
        ({"n": 10**6}, "n"),
        ({"n": 1.5}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -5}, "max_tokens"),
        ({"max_tokens": 5, "min_tokens": 6}, "min_tokens"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": -2.5}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"seed": 2**70}, "seed"),
        ({"seed": "x"}, "seed"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["x"] * 100}, "stop"),
        ({"stop": ["x" * 5000]}, "stop"),
        ({"stop_token_ids": [10**6]}, "stop_token_ids"),
        ({"stop_token_ids": ["x"]}, "stop_token_ids.0"),
        ({"logprobs": -2}, "logprobs"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"prompt_logprobs": 1000}, "prompt_logprobs"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"prompt_logprobs": -1, "stream": True}, "prompt_logprobs"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"100000": 1}}, "logit_bias"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"allowed_token_ids": [10**6]}, "allowed_token_ids"),
        ({"bad_words": [""]}, "bad_words"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream_options": 3, "stream": True}, "stream_options"),
        ({"cache_salt": ""}, "cache_salt"),
        ({"cache_salt": "a/b"}, "cache_salt"),
        ({"cache_salt": "x" * 200}, "cache_salt"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": 10**6}, "truncate_prompt_tokens"),
        ({"truncation_side": "middle"}, "truncation_side"),
        ({"repetition_detection": {"max_pattern_size": 0}}, "repetition_detection.max_pattern_size"),
        ({"priority": 2**80}, "priority"),
        ({"prompt": None}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": {}}, "prompt"),
        ({"prompt": 7}, "prompt"),
        ({"prompt": ["a", 3]}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt"),
        ({"prompt": [[1], []]}, "prompt"),
        ({"prompt": [1, True]}, "prompt"),
        ({"prompt": ["x"] * 1025}, "prompt"),
        ({"prompt": [1, -1]}, "prompt_token_ids"),
        ({"prompt": [1, 10**6]}, "prompt_token_ids"),
        ({"prompt": "x" * MAX_MODEL_LEN}, "prompt"),
        ({"prompt": "x" * 100_000}, "prompt"),
        ({"prompt": [1] * MAX_MODEL_LEN}, "prompt"),
    ],
)
def test_wrong_fields_of_a_completion(server: Running, fields: dict[str, Any], param: str) -> None:
    headers = {"Content-Type": "application/json"}
    for stream in (False, True):
        if stream and "stream_options" in fields:
            continue
        body = json.dumps({"prompt": HELLO} | ({"stream": True} if stream else {}) | fields)
        error = refused(server.http.post("/v1/completions", content=body, headers=headers))
        assert error["param"] == param
        assert error["type"] in ("BadRequestError", "Bad Request")
    assert server.client.completions.create(model="", prompt=HELLO).choices[0].text == "hello"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [3]}, "messages[0]"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [*CHAT, {"content": "x"}]}, "messages[1].role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
            "messages[0].content[0].type",
        ),
        ({"tools": []}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "some"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"top_logprobs": -2, "logprobs": True}, "top_logprobs"),
        ({"top_logprobs": 100, "logprobs": True}, "logprobs"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"a": list(range(1000))}}, "chat_template_kwargs"),
        ({"add_generation_prompt": True, "continue_final_message": True}, "continue_final_message"),
        ({"max_completion_tokens": 0}, "max_tokens"),
    ],
)
def test_wrong_fields_of_a_chat(server: Running, fields: dict[str, Any], param: str) -> None:
    for stream in (False, True):
        response = server.http.post("/v1/chat/completions", json={"messages": CHAT, "stream": stream} | fields)
        assert refused(response)["param"] == param
    said = server.http.post("/v1/chat/completions", json={"messages": CHAT})
    assert said.json()["choices"][0]["message"]["content"] == "hello"


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt_embeds": "eA=="},
        {"best_of": 3},
        {"watermarking": True},
        {"prompt_logprob_token_ids": [1]},
        {"kv_transfer_params": {"a": 1}},
        {"logits_processors": ["a.b"]},
        {"modalities": ["text", "audio"]},
    ],
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_what_is_not_there_yet_is_refused_by_name(server: Running, path: str, fields: dict[str, Any]) -> None:
    error = refused(server.http.post(path, json={"prompt": HELLO, "messages": CHAT} | fields))
    assert error["param"] == next(iter(fields))
    assert "not supported" in error["message"]


def test_a_priority_that_has_no_effect_is_refused(server: Running) -> None:
    assert server.http.post("/v1/completions", json={"prompt": HELLO, "priority": 5}).is_success
    server.service.takes_priority = False
    try:
        assert (
            refused(server.http.post("/v1/completions", json={"prompt": HELLO, "priority": 5}))["param"] == "priority"
        )
        assert server.http.post("/v1/completions", json={"prompt": HELLO, "priority": 0}).is_success
    finally:
        server.service.takes_priority = True


def test_values_that_ask_for_nothing_are_fine(server: Running) -> None:
    body = {
        "response_format": {"type": "text"},
        "suffix": None,
        "best_of": 1,
        "use_beam_search": False,
        "length_penalty": 1.0,
        "user": "me",
        "metadata": {"a": "b"},
        "modalities": ["text"],
        "tool_choice": "none",
        "parallel_tool_calls": True,
        "temperature": None,
        "max_tokens": None,
        "stop": None,
        "logit_bias": None,
    }
    assert server.http.post("/v1/completions", json={"prompt": HELLO} | body).status_code == 200
    assert server.http.post("/v1/chat/completions", json={"messages": CHAT} | body).status_code == 200


def test_unknown_fields_are_ignored_and_misspelt_ones_are_logged(
    server: Running, caplog: pytest.LogCaptureFixture
) -> None:
    _note_unknown.cache_clear()
    logging.getLogger("quire").propagate = True
    with caplog.at_level("WARNING", logger="quire.serve.fields"):
        body = {"prompt": HELLO, "temprature": 0.5, "xyzzy": 1}
        assert server.http.post("/v1/completions", json=body).status_code == 200
        assert server.http.post("/v1/completions", json=body).status_code == 200
    assert [record.getMessage() for record in caplog.records if "unknown field" in record.getMessage()] == [
        "a request has the unknown field 'temprature', which is ignored; was 'temperature' meant?"
    ]


def test_bodies_that_are_no_json(server: Running) -> None:
    def post(content: bytes, kind: str | None = "application/json") -> dict[str, Any]:
        headers = {} if kind is None else {"Content-Type": kind}
        return refused(server.http.post("/v1/completions", content=content, headers=headers))

    assert "valid JSON" in post(b"{")["message"]
    post(b"\xff\xfe{}")
    post(b"")
    post(b"[]")
    post(b"3")
    post(b"[" * 100_000)
    assert "application/json" in post(b'{"prompt": "x"}', "text/plain")["message"]
    assert "application/json" in post(b'{"prompt": "x"}', None)["message"]
    assert server.http.post(
        "/v1/completions", content=b'{"prompt": "x"}', headers={"Content-Type": "application/json; charset=utf-8"}
    ).is_success


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=8),
    st.lists(st.integers(-5, 300), max_size=3),
    st.lists(st.text(max_size=3), max_size=3),
    st.dictionaries(st.text(max_size=4), st.integers(-200, 200), max_size=2),
    st.just([[[[]]]]),
)


@pytest.mark.parametrize(
    ("path", "kind", "base"),
    [
        ("/v1/completions", CompletionRequest, {"prompt": HELLO}),
        ("/v1/chat/completions", ChatRequest, {"messages": CHAT}),
        ("/tokenize", TokenizeRequest, {"prompt": HELLO}),
        ("/detokenize", DetokenizeRequest, {"tokens": [1, 2]}),
    ],
)
@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_no_body_makes_the_server_fail(
    server: Running, path: str, kind: type[ApiRequest], base: dict[str, Any], data: st.DataObject
) -> None:
    names = st.sampled_from([*kind.model_fields, *REFUSED, "unknown"])
    odd = data.draw(st.dictionaries(names, ODD, min_size=1, max_size=4))
    content = json.dumps({"max_tokens": 4} | base | odd)
    response = server.http.post(path, content=content, headers={"Content-Type": "application/json"})
    assert response.status_code in (200, 400, 404), (odd, response.text)
    if response.status_code != 200:
        refused(response, response.status_code)


def test_unknown_models_and_paths(server: Running) -> None:
    for path, body in (("/v1/completions", {"prompt": HELLO}), ("/v1/chat/completions", {"messages": CHAT})):
        error = refused(server.http.post(path, json=body | {"model": "nobody"}), 404)
        assert (error["param"], error["type"]) == ("model", "NotFoundError")
        assert "`parrot`" in error["message"] and "nobody" in error["message"]
    with pytest.raises(openai.NotFoundError):
        server.client.completions.create(model="nobody", prompt="x")
    refused(server.http.get("/v1/nothing"), 404)
    refused(server.http.get("/v1/completions"), 405)
