"""What clients see when they or the engine go wrong, who is let in, and that nobody else notices."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from served import MAX_MODEL_LEN, TOKENIZER, Running, Setup, served
from starlette.types import Message, Receive, Scope, Send

from quire.config import ServeOptions
from quire.errors import ConfigError
from quire.serve.app import BodyLimit
from quire.serve.auth import PUBLIC, KeyCheck, check_bind
from quire.serve.protocol import (
    _REFUSED,
    ApiRequest,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
    _note_unknown,
)

HELLO = "say:hello;|"
CHAT = [{"role": "user", "content": "say:hello;"}]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with served() as running:
        yield running


def refused(response: httpx.Response, status: int = 400) -> dict[str, Any]:
    """The error of a response, which has the right status and shape and says nothing of the inside."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["code"] == status
    assert error["message"] and not any(
        word in error["message"] for word in ("Traceback", "/work", "/src", "0x", ".py")
    )
    return error


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
        ({"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "required"}, "tool_choice"),
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
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}},
        {"structured_outputs": {"regex": "a"}},
        {"guided_json": {}},
        {"guided_regex": "a+"},
        {"suffix": "x"},
        {"prompt_embeds": "eA=="},
        {"use_beam_search": True},
        {"best_of": 3},
        {"length_penalty": 2.0},
        {"logprob_token_ids": [1]},
        {"thinking_token_budget": 5},
        {"kv_transfer_params": {"a": 1}},
        {"vllm_xargs": {"a": 1}},
        {"functions": [{"name": "f"}]},
        {"modalities": ["text", "audio"]},
        {"include_reasoning": False},
    ],
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_what_is_not_there_yet_is_refused_by_name(server: Running, path: str, fields: dict[str, Any]) -> None:
    error = refused(server.http.post(path, json={"prompt": HELLO, "messages": CHAT} | fields))
    assert error["param"] == next(iter(fields))
    assert "not supported" in error["message"]


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
    with caplog.at_level("WARNING", logger="quire.serve.protocol"):
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
    names = st.sampled_from([*kind.model_fields, *_REFUSED, "unknown"])
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


# -------------------------------------------------------------------- the other routes


def test_models(server: Running) -> None:
    listed = server.client.models.list().data
    assert [model.id for model in listed] == ["parrot", "bird"]
    assert server.client.models.retrieve("bird").id == "bird"
    body = server.http.get("/v1/models").json()
    assert body["object"] == "list" and body["data"][0]["max_model_len"] == MAX_MODEL_LEN
    assert body["data"][0]["owned_by"] == "quire"
    refused(server.http.get("/v1/models/nobody"), 404)


def test_small_routes(server: Running) -> None:
    assert server.http.get("/health").content == b""
    assert server.http.head("/health").is_success
    assert server.http.get("/ping").is_success and server.http.post("/ping").is_success
    assert set(server.http.get("/version").json()) == {"version"}
    assert server.http.get("/load").json() == {"server_load": 0}
    assert "/v1/completions" in server.http.get("/openapi.json").json()["paths"]


def test_tokens_to_and_from_text(server: Running) -> None:
    post = server.http.post
    body = post("/tokenize", json={"prompt": "hé", "return_token_strs": True}).json()
    assert body == {
        "count": 4,
        "max_model_len": MAX_MODEL_LEN,
        "tokens": TOKENIZER.encode("hé"),
        "token_strs": ["<s>", "h", "\ufffd", "\ufffd"],
    }
    bare = post("/tokenize", json={"prompt": "hé", "add_special_tokens": False}).json()
    assert bare["count"] == 3 and bare["token_strs"] is None
    chat = post("/tokenize", json={"messages": CHAT}).json()
    text = post("/detokenize", json={"tokens": chat["tokens"]}).json()["prompt"]
    assert text == "<|turn|>user:say:hello;<|end|><|turn|>assistant|"
    refused(post("/tokenize", json={}))
    refused(post("/tokenize", json={"prompt": "x", "messages": CHAT}))
    refused(post("/tokenize", json={"messages": [{}]}))
    refused(post("/detokenize", json={"tokens": [-1]}))
    refused(post("/detokenize", json={"tokens": [10**6]}))
    refused(post("/detokenize", json={"tokens": "x"}))


# -------------------------------------------------------------------- keys and addresses


def test_keys() -> None:
    with served(Setup(keys=("secret", "other"))) as server:
        assert server.client.completions.create(model="", prompt=HELLO).choices[0].text == "hello"
        with httpx.Client(base_url=server.url) as bare:
            for path in ("/v1/models", "/v1/completions", "/tokenize", "/load", "/docs", "/openapi.json", "/nothing"):
                response = bare.get(path)
                refused(response, 401)
                assert response.headers["www-authenticate"] == "Bearer"
            for path in (
                "/health/",
                "//health",
                "/health/../v1/models",
                "/v1/models?x=/health",
                "/HEALTH",
                "/health%2f",
            ):
                refused(bare.get(path), 401)
            refused(bare.get("/v1/models", headers={"Host": "x/health?"}), 401)
            for given in ("", "Bearer", "Bearer wrong", "Basic secret", "secret", "Bearer secretx"):
                refused(bare.get("/v1/models", headers={"Authorization": given}), 401)
            for given in ("Bearer secret", "bearer other"):
                assert bare.get("/v1/models", headers={"Authorization": given}).is_success
            assert {path for path in PUBLIC if bare.get(path).is_success} == PUBLIC


def test_a_websocket_needs_a_key_too() -> None:
    sent: list[Message] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise AssertionError("let through")

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    scope = {"type": "websocket", "path": "/health", "headers": []}
    asyncio.run(KeyCheck(app, ["secret"])(scope, receive, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]


def test_public_addresses_need_a_key() -> None:
    for host in ("127.0.0.1", "localhost", "::1", "127.8.9.1"):
        check_bind(host, (), allow_insecure=False)
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.com", ""):
        with pytest.raises(ConfigError, match="--api-key"):
            check_bind(host, (), allow_insecure=False)
        check_bind(host, ("key",), allow_insecure=False)
        check_bind(host, (), allow_insecure=True)


def test_a_path_prefix_of_a_proxy() -> None:
    """The proxy takes the prefix off; the server only knows of it."""
    with served(Setup(options=ServeOptions(root_path="/ai"), keys=("secret",))) as server, httpx.Client() as bare:
        assert bare.get(server.url + "/health").is_success
        for path in ("/v1/models", "/ai/health", "/ai"):
            refused(bare.get(server.url + path), 401)
        assert server.http.get("/v1/models").is_success


# -------------------------------------------------------------------- limits


def test_bodies_that_are_too_large() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": 200, "headers": []})

    def status(chunks: list[bytes], headers: list[tuple[bytes, bytes]]) -> int:
        sent: list[Message] = []
        left = list(chunks)

        async def receive() -> Message:
            return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}

        async def send(message: Message) -> None:
            sent.append(message)

        try:
            asyncio.run(BodyLimit(app, 10)({"type": "http", "headers": headers}, receive, send))
        except Exception as error:
            return getattr(error, "status_code", 0)
        return sent[0]["status"]

    assert status([b"12345", b"67890"], []) == 200
    assert status([b"12345", b"678901"], []) == 413
    assert status([b""], [(b"content-length", b"11")]) == 413


def test_a_full_queue() -> None:
    with served(Setup(settings={"max_num_queued_reqs": 1}, max_num_seqs=1, delay=0.01)) as server:
        body = {"prompt": "x|", "max_tokens": 100}
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(server.http.post, "/v1/completions", json=body)
            _until(lambda: server.metrics.stats.running == 1)
            second = pool.submit(server.http.post, "/v1/completions", json=body)
            _until(lambda: server.metrics.stats.waiting == 1)
            for stream in (False, True):
                response = server.http.post("/v1/completions", json=body | {"stream": stream})
                assert refused(response, 503)["type"] == "ServiceUnavailableError"
                assert int(response.headers["retry-after"]) >= 1
            assert first.result().is_success and second.result().is_success


def test_a_server_that_drains_takes_nothing_new_and_finishes_the_rest() -> None:
    with served(Setup(delay=0.01)) as server, ThreadPoolExecutor(1) as pool:
        running = pool.submit(server.http.post, "/v1/completions", json={"prompt": "x|", "max_tokens": 50})
        _until(lambda: server.metrics.stats.running == 1)
        server.service.draining = True
        response = server.http.post("/v1/completions", json={"prompt": "x|"})
        assert "shutting down" in refused(response, 503)["message"] and "retry-after" in response.headers
        refused(server.http.get("/health"), 503)
        assert running.result().json()["choices"][0]["finish_reason"] == "length"


def _until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


# -------------------------------------------------------------------- failures


def test_a_request_that_fails_hurts_nobody(server: Running) -> None:
    for path, body in (
        ("/v1/completions", {"prompt": "crash;|"}),
        ("/v1/completions", {"prompt": ["say:a;|", "crash after 3;|"]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "crash after 2;"}]}),
    ):
        with server.http.stream(
            "POST", "/v1/completions", json={"prompt": "x|", "max_tokens": 100, "stream": True}
        ) as it:
            lines = it.iter_lines()
            next(lines)
            error = refused(server.http.post(path, json=body), 500)
            assert error["type"] == "InternalServerError" and "boom" not in error["message"]
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]" and json.loads(rest[-2][6:])["choices"][0]["finish_reason"] == "length"
    server.wait_idle()


def test_a_stream_that_fails_says_so_and_ends(server: Running) -> None:
    body = {"prompt": "crash after 4;|", "stream": True}
    with server.http.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    assert json.loads(lines[-2])["error"]["code"] == 500 and "boom" not in lines[-2]
    assert "".join(json.loads(line)["choices"][0]["text"] for line in lines[:-2]) == "abcd"
    with pytest.raises(openai.APIError):
        list(server.client.completions.create(model="", **body))
    refused(server.http.post("/v1/completions", json={"prompt": "crash;|", "stream": True}), 500)


def test_an_engine_that_died() -> None:
    def die() -> list[Any]:
        raise MemoryError("the machine is gone")

    with served(Setup(delay=0.01)) as server:
        body = {"prompt": "x|", "max_tokens": 300, "stream": True}
        with server.http.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            server.service.engine.engine.step = die  # type: ignore[method-assign]
            rest = [line.removeprefix("data: ") for line in lines if line]
        assert rest[-1] == "[DONE]"
        assert json.loads(rest[-2])["error"]["code"] == 503 and "gone" not in rest[-2]
        for path in ("/health", "/ping"):
            refused(server.http.get(path), 503)
        error = refused(server.http.post("/v1/completions", json={"prompt": HELLO}), 503)
        assert "gone" not in error["message"]
        assert server.http.get("/version").is_success


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("prompts", ["x|", ["x|", "y|", "z|"]])
def test_a_client_that_leaves_ends_its_request(stream: bool, prompts: Any) -> None:
    with served(Setup(delay=0.005)) as server:
        body = json.dumps({"prompt": prompts, "max_tokens": 500, "stream": stream, "n": 2}).encode()
        port = int(server.url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n" % len(body) + body
            )
            _until(lambda: server.metrics.stats.running > 0)
            assert server.http.get("/load").json() == {"server_load": 1}
        server.wait_idle(2.0)
        figures = server.figures()
        assert figures["quire:request_success_total{finished_reason=abort}"] == (2 if prompts == "x|" else 6)
        assert figures["quire:kv_cache_usage_perc"] == 0
        assert figures["quire:generation_tokens_total"] < 3000


def test_many_clients_that_leave() -> None:
    """Dropped in every phase of a request; afterwards nothing is left and the server answers."""
    with served(Setup(delay=0.002)) as server:
        port = int(server.url.rpartition(":")[2])
        for number in range(60):
            body = json.dumps({"prompt": f"{number} x|", "max_tokens": 400, "stream": number % 2 == 0}).encode()
            with socket.create_connection(("127.0.0.1", port)) as connection:
                request = (
                    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                    b"Content-Length: %d\r\n\r\n" % len(body) + body
                )
                connection.sendall(request[: len(request) - number % 3 * 10])
                time.sleep(number % 5 * 0.003)
        server.wait_idle()
        assert server.client.completions.create(model="", prompt=HELLO).choices[0].text == "hello"


def test_a_body_that_never_comes(caplog: pytest.LogCaptureFixture) -> None:
    with served() as server:
        port = int(server.url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Content-Length: 99\r\n\r\n{"
            )
        time.sleep(0.05)
        assert server.http.get("/health").is_success
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
