"""Limits, failing requests, a dead engine, clients that leave: the others go on, and nothing is left behind."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from served import HELLO, Running, Setup, refused, served
from starlette.types import Message, Receive, Scope, Send

from quire.serve.app import BodyLimit
from waiting import until

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
            asyncio.run(
                BodyLimit(app, 10)({"type": "http", "path": "/v1/completions", "headers": headers}, receive, send)
            )
        except Exception as error:
            return getattr(error, "status_code", 0)
        return sent[0]["status"]

    assert status([b"12345", b"67890"], []) == 200
    assert status([b"12345", b"678901"], []) == 413
    assert status([b""], [(b"content-length", b"11")]) == 413


def test_a_full_queue() -> None:
    with served(Setup(settings={"max_num_queued_reqs": 1}, max_num_seqs=1, delay=0.02)) as server:
        body = {"prompt": "x|", "max_tokens": 400}
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(server.http.post, "/v1/completions", json=body, headers={"X-Request-Id": "first"})
            until(lambda: server.metrics.stats.running == 1)
            second = pool.submit(server.http.post, "/v1/completions", json=body | {"max_tokens": 5})
            until(lambda: server.metrics.stats.waiting == 1)
            for stream in (False, True):
                response = server.http.post("/v1/completions", json=body | {"stream": stream})
                assert refused(response, 503)["type"] == "ServiceUnavailableError"
                assert int(response.headers["retry-after"]) >= 1
            assert server.http.delete("/v1/requests/first").is_success
            assert first.result().is_success and second.result().is_success


def test_a_server_that_drains_takes_nothing_new_and_finishes_the_rest() -> None:
    with served(Setup(delay=0.01)) as server, ThreadPoolExecutor(1) as pool:
        running = pool.submit(server.http.post, "/v1/completions", json={"prompt": "x|", "max_tokens": 50})
        until(lambda: server.metrics.stats.running == 1)
        server.service.draining = True
        response = server.http.post("/v1/completions", json={"prompt": "x|"})
        assert "shutting down" in refused(response, 503)["message"] and "retry-after" in response.headers
        refused(server.http.get("/health"), 503)
        assert running.result().json()["choices"][0]["finish_reason"] == "length"


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
    def die(at_most: int) -> list[Any]:
        raise MemoryError("the machine is gone")

    with served(Setup(delay=0.02)) as server:
        body = {"prompt": "x|", "max_tokens": 400, "stream": True}
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
    with served(Setup(delay=0.02)) as server:
        body = json.dumps({"prompt": prompts, "max_tokens": 500, "stream": stream, "n": 2}).encode()
        port = int(server.url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n" % len(body) + body
            )
            until(lambda: server.metrics.stats.running > 0)
            assert server.http.get("/load").json() == {"server_load": 1}
        server.wait_idle()
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
