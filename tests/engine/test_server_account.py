"""Each request's own account, in its answer and in the log."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from served import CHAT, Running, Setup, served

from quire.config import ServeOptions
from quire.engine.outputs import CompletionOutput, RequestMetrics, RequestOutput
from quire.env import JsonLines
from quire.serve.account import Account
from quire.serve.progress import Progress
from waiting import until

FIELDS = {
    "queue_ms",
    "prefill_ms",
    "decode_ms",
    "total_ms",
    "cached_tokens",
    "preemptions",
    "restarts",
    "mean_batch_mates",
    "why",
}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "say:hello;|"},
    "/v1/chat/completions": {"messages": CHAT},
    "/v1/responses": {"input": "say:hello;"},
    "/v1/messages": {"messages": CHAT, "max_tokens": 20},
}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with served(Setup(delay=0.005)) as running:
        yield running


def usages(text: str) -> list[dict[str, Any]]:
    """Every usage of a stream."""
    found = []
    for line in text.splitlines():
        if line.startswith("data: {"):
            chunk = json.loads(line[6:])
            found.append(chunk.get("usage") or chunk.get("response", {}).get("usage"))
    return [usage for usage in found if usage]


@pytest.mark.parametrize("path", BODIES)
def test_an_answer_tells_it_where_it_is_asked_for(server: Running, path: str) -> None:
    plain = server.http.post(path, json=BODIES[path]).json()
    assert "quire" not in plain["usage"]
    told = server.http.post(path, json=BODIES[path] | {"include_account": True}).json()["usage"]["quire"]
    assert set(told) == FIELDS
    assert told["total_ms"] >= told["queue_ms"] + told["prefill_ms"] + told["decode_ms"] - 1
    assert told["decode_ms"] >= 20, "five more tokens, 5 ms each"
    streamed = server.http.post(path, json=BODIES[path] | {"include_account": True, "stream": True})
    assert set(usages(streamed.text)[-1]["quire"]) == FIELDS


def test_the_operator_may_have_it_told_always() -> None:
    with served(Setup(options=ServeOptions(enable_request_account=True))) as server:
        for path, body in BODIES.items():
            assert set(server.http.post(path, json=body).json()["usage"]["quire"]) == FIELDS
        streamed = server.http.post("/v1/completions", json=BODIES["/v1/completions"] | {"stream": True})
        assert not usages(streamed.text), "a stream gets no chunk that its client did not ask for"


def test_waiting_is_seen_as_waiting() -> None:
    with served(Setup(delay=0.01, max_num_seqs=1)) as server, ThreadPoolExecutor(2) as pool:
        endless = {"prompt": "x|", "max_tokens": 480}
        first = pool.submit(server.http.post, "/v1/completions", json=endless, headers={"X-Request-Id": "first"})
        until(lambda: server.metrics.stats.running == 1)
        second = pool.submit(
            server.http.post, "/v1/completions", json=endless | {"max_tokens": 5, "include_account": True}
        )
        until(lambda: server.metrics.stats.waiting == 1)
        begun = server.metrics.stats.steps
        until(lambda: server.metrics.stats.steps > begun + 50 or first.done())
        server.http.delete("/v1/requests/first")
        told = second.result().json()["usage"]["quire"]
        assert told["queue_ms"] >= 500, "fifty steps of 10 ms each"
        assert "waiting for room" in told["why"] and told["mean_batch_mates"] < 1


def made(queue: float, prefill: float, decode: float, preemptions: int = 0, tokens: int = 11) -> Account:
    account = Account()
    account.open("id-1", "t", Progress())
    account.began = 100.0
    times = RequestMetrics(0.0, 100.0, 100 + queue, 100 + queue + prefill, 100 + queue + prefill + decode)
    times.num_preemptions = preemptions
    output = RequestOutput("id-1", None, [1] * 50, None, [CompletionOutput(0, "", [1] * tokens)], True, times, 20)
    output.outputs[0].finish_reason = "stop"
    account.note(output)
    account.ended = 100 + queue + prefill + decode
    return account


@pytest.mark.parametrize(
    ("phases", "words"),
    [
        ((8.0, 1.0, 1.0), "80% of 10.00 s went by waiting for room"),
        ((1.0, 8.0, 1.0), "30 of 50 tokens had to be computed"),
        ((1.0, 1.0, 8.0), "11 tokens, one every 800.0 ms"),
    ],
)
def test_why(phases: tuple[float, float, float], words: str) -> None:
    assert words in made(*phases).why()
    assert "gave way 2 times" in made(*phases, preemptions=2).why()
    assert "gave way" not in made(*phases).why()


def test_why_where_nothing_is_known() -> None:
    account = Account()
    account.close()
    assert "tells no times" in account.why() and account.usage()["queue_ms"] == 0


def test_mates_are_counted_over_the_steps_of_its_life() -> None:
    progress = Progress()
    progress.steps, progress.rows = 10, 1000
    account = Account()
    account.open("id", "", progress)
    progress.steps, progress.rows = 14, 1012
    assert account.mates == 2


def test_one_line_for_each_request(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "quire"):
        server.http.post("/v1/completions", json={"prompt": "zebras say:hello;|", "request_id": "mine"})
        server.http.post("/v1/completions", json={"prompt": "crash;|", "request_id": "bad"})
        server.wait_idle()
    lines = [record for record in caplog.records if record.name == "quire.serve.service" and record.levelname == "INFO"]
    assert [line.getMessage().split(":")[0] for line in lines] == [
        "cmpl-mine stop",
        "cmpl-bad failed (RequestFailedError)",
    ]
    assert "19 tokens in (0 cached), 6 out" in lines[0].getMessage() and "zebras" not in caplog.text
    record = lines[0].request  # type: ignore[attr-defined]
    assert record["id"] == "cmpl-mine" and record["ending"] == "stop" and record["output_tokens"] == 6
    assert set(record) > FIELDS


def test_a_log_in_json() -> None:
    logger = logging.getLogger("test of the log in json")
    logger.propagate = False
    stream = io.StringIO()
    logger.addHandler(logging.StreamHandler(stream))
    logger.handlers[0].setFormatter(JsonLines())
    logger.warning("line one\nline two %s", "ä", extra={"request": {"id": "x"}})
    try:
        raise ValueError("no")
    except ValueError:
        logger.exception("failed")
    first, second = (json.loads(line) for line in stream.getvalue().splitlines())
    assert (
        first["message"] == "line one\nline two ä" and first["request"] == {"id": "x"} and first["level"] == "warning"
    )
    assert "ValueError: no" in second["error"] and "request" not in second and second["time"].endswith("+00:00")
    assert first["process"] == os.getpid()


def test_processes_that_are_started_log_in_json_too() -> None:
    code = "from quire import env; import logging; env.set_up_logging(); logging.getLogger('quire.x').warning('hello')"
    found = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "QUIRE_LOG_FORMAT": "json"}, capture_output=True, text=True
    )
    assert json.loads(found.stderr)["message"] == "hello"
