"""The small routes, who is let in, and at which addresses the server may listen."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from served import CHAT, HELLO, MAX_MODEL_LEN, TOKENIZER, Running, Setup, refused, served
from starlette.types import Message, Receive, Scope, Send

from quire.config import ServeOptions
from quire.errors import ConfigError
from quire.serve.auth import PUBLIC, KeyCheck, check_bind

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
        with httpx.Client(base_url=server.url, timeout=60) as bare:
            for path in ("/v1/models", "/v1/completions", "/tokenize", "/load", "/docs", "/openapi.json", "/nothing"):
                response = bare.get(path)
                refused(response, 401)
                assert response.headers["www-authenticate"] == "Bearer"
            for path in (
                "/health/",
                "/v1//health",
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
    with (
        served(Setup(options=ServeOptions(root_path="/ai"), keys=("secret",))) as server,
        httpx.Client(timeout=60) as bare,
    ):
        assert bare.get(server.url + "/health").is_success
        for path in ("/v1/models", "/ai/health", "/ai"):
            refused(bare.get(server.url + path), 401)
        assert server.http.get("/v1/models").is_success
