"""Requests in forms that other clients use: HEAD, slashes at the end, odd bodies; and what client libraries look for."""

from __future__ import annotations

import gzip
import json
import socket

import anthropic
import httpx
import pytest
from served import MAX_MODEL_LEN, Running, refused

from quire.serve.middleware import LONG_BODY

JSON = {"Content-Type": "application/json"}
HELLO = {"prompt": "say:hello;|"}
TURN = [{"role": "user", "content": "say:hello;"}]


@pytest.mark.parametrize(
    "path", ["/", "/health", "/livez", "/readyz", "/ping", "/version", "/load", "/metrics", "/v1/models", "/docs"]
)
def test_what_can_be_got_can_be_asked_for_its_head(server: Running, path: str) -> None:
    got, head = server.http.get(path), server.http.head(path)
    assert got.status_code == head.status_code == 200 and head.content == b""
    assert got.headers.get("content-type") == head.headers.get("content-type")


def test_a_post_route_has_no_head(server: Running) -> None:
    assert server.http.head("/v1/completions").status_code == 405


def test_a_slash_at_the_end_means_nothing(server: Running) -> None:
    assert server.http.get("/v1/models/").json() == server.http.get("/v1/models").json()
    response = server.http.post("/v1/completions/", json=HELLO)
    assert response.status_code == 200 and response.json()["choices"][0]["text"] == "hello"
    assert server.http.get("/health/").is_success and server.http.get("/").is_success
    refused(server.http.get("/nothing/"), 404)


def test_a_path_that_nearly_is_a_route_says_so(server: Running) -> None:
    """Base addresses with a slash too many, or with one /v1 too many or too few, are the commonest mistakes."""
    slashes = b"GET //v1///models HTTP/1.1\r\nHost: x\r\n\r\n"
    assert b"200 OK" in raw(server, slashes) and b'"object":"list"' in raw(server, slashes)
    for path in ("/chat/completions", "/v1/v1/chat/completions", "/openai/deployments/x/chat/completions"):
        assert "/v1/chat/completions" in refused(server.http.post(path, json={}), 404)["message"]
    for path in ("/v1/files", "/v1/batches", "/v1/assistants", "/v1/embeddings", "/api/chat", "/v1"):
        assert "/docs" in refused(server.http.post(path, json={}), 404)["message"]
    assert "POST" in refused(server.http.get("/v1/completions"), 405)["message"]


@pytest.mark.parametrize(
    ("coding", "status", "words"),
    [("gzip", 415, "Content-Encoding"), ("br, gzip", 415, "Content-Encoding"), ("identity", 400, "UTF-8")],
)
def test_a_compressed_body_is_refused_by_name(server: Running, coding: str, status: int, words: str) -> None:
    body = gzip.compress(json.dumps(HELLO).encode())
    response = server.http.post("/v1/completions", content=body, headers={**JSON, "Content-Encoding": coding})
    refused(response, status)
    assert words in response.json()["error"]["message"]


@pytest.mark.parametrize("codec", ["utf-8", "utf-8-sig", "utf-16"])
def test_json_in_any_unicode(server: Running, codec: str) -> None:
    body = json.dumps({"prompt": "say:né;|"}, ensure_ascii=False).encode(codec)
    response = server.http.post("/v1/completions", content=body, headers=JSON)
    assert response.status_code == 200 and response.json()["choices"][0]["text"] == "né"


def test_json_in_no_unicode(server: Running) -> None:
    body = json.dumps({"prompt": "né"}, ensure_ascii=False).encode("latin-1")
    response = server.http.post("/v1/completions", content=body, headers=JSON)
    refused(response)
    assert "UTF-8" in response.json()["error"]["message"]


def test_a_number_too_long_to_read(server: Running) -> None:
    response = server.http.post("/v1/completions", content=b'{"seed": %s}' % (b"9" * 5000), headers=JSON)
    assert "JSON" in refused(response)["message"]


def test_a_long_body_is_looked_at_like_a_short_one(server: Running) -> None:
    """In a thread, that is."""
    space = b" " * LONG_BODY
    for content, words in (
        (b'{"x": %s1%s}' % (b"[" * 99, b"]" * 99), "nested"),
        (b'"\\ud800"', "Unicode"),
        (b"", "JSON"),
    ):
        response = server.http.post("/v1/completions", content=content + space, headers=JSON)
        assert words in refused(response)["message"]
    padded = json.dumps(HELLO).encode() + space
    assert server.http.post("/v1/completions", content=padded, headers=JSON).status_code == 200


def raw(server: Running, request: bytes) -> bytes:
    """What a connection brings until it ends or is silent."""
    url = httpx.URL(server.url)
    with socket.create_connection((url.host, url.port or 80), 5) as connection:
        connection.settimeout(0.5)
        connection.sendall(request)
        found = b""
        try:
            while data := connection.recv(65536):
                found += data
        except TimeoutError:
            pass
        return found


def test_http_of_other_times(server: Running) -> None:
    body = json.dumps(HELLO).encode()
    head = b"POST /v1/completions HTTP/%s\r\nHost: x\r\nContent-Type: application/json\r\n%s\r\n"
    length = b"Content-Length: %d\r\n" % len(body)
    assert b'"hello"' in raw(server, head % (b"1.0", length) + body)
    chunked = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    assert b'"hello"' in raw(server, head % (b"1.1", b"Transfer-Encoding: chunked\r\n") + chunked)
    waiting = raw(server, head % (b"1.1", length + b"Expect: 100-continue\r\n") + body)
    assert waiting.startswith(b"HTTP/1.1 100 ") and b'"hello"' in waiting
    twice = b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n"
    assert raw(server, twice * 2).count(b"200 OK") == 2
    assert raw(server, b"\x16\x03\x01\x02\x00\x01").startswith(b"HTTP/1.1 400")
    assert raw(server, head % (b"1.1", length + b"Content-Length: 3\r\n") + body).startswith(b"HTTP/1.1 400")
    both = raw(server, head % (b"1.1", length + b"Transfer-Encoding: chunked\r\n") + chunked + twice)
    assert both.startswith(b"HTTP/1.1 400") and both.count(b"HTTP/1.1") == 1, "nothing behind it is believed"


def test_what_the_anthropic_library_looks_for(server: Running) -> None:
    client = anthropic.Anthropic(base_url=server.url, api_key="x", max_retries=0)
    answer = client.messages.create(model="parrot", max_tokens=8, messages=TURN)
    assert answer._request_id
    with pytest.raises(anthropic.NotFoundError) as caught:
        client.messages.create(model="nobody", max_tokens=8, messages=TURN)
    assert caught.value.request_id


def test_a_model_without_thoughts_needs_no_limit_for_them(server: Running) -> None:
    """Agents ask every model to think. One that marks no thoughts answers without."""
    body = {
        "max_tokens": 20,
        "thinking": {"type": "enabled", "budget_tokens": 10},
        "messages": [{"role": "user", "content": "say:hello;|"}],
    }
    response = server.http.post("/v1/messages", json=body)
    assert response.status_code == 200, response.text
    assert response.json()["content"] == [{"type": "text", "text": "hello"}]
    refused(server.http.post("/v1/chat/completions", json={"messages": TURN, "thinking_token_budget": 10}))


@pytest.mark.parametrize("length", [MAX_MODEL_LEN, MAX_MODEL_LEN + 1])
def test_a_prompt_that_is_too_long_is_known_by_its_words(server: Running, length: int) -> None:
    """By these words agents and proxies tell this error from others, and shorten the conversation."""
    response = server.http.post("/v1/completions", json={"prompt": [5] * length, "max_tokens": 1})
    refused(response)
    assert f"this model's maximum context length is {MAX_MODEL_LEN} tokens" in response.json()["error"]["message"]
