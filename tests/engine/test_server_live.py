"""Health told by progress, requests that can be asked about and cancelled, and how streams are paced."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from served import Running, Setup, refused, served

from quire.config import ServeOptions
from quire.core.stats import Stats
from quire.engine.engine import Place
from quire.engine.observe import StepFigures
from quire.serve.live import Live, LiveRequest
from quire.serve.progress import Progress
from quire.serve.protocol import MOST_TOKENS
from quire.text import Tokenizer
from waiting import until

ENDLESS = {"prompt": "x|", "max_tokens": 400, "stream": True}


@contextmanager
def streaming(server: Running, name: str, **fields: Any) -> Iterator[Iterator[str]]:
    """The lines of a stream whose id is cmpl-NAME. Letting go of the iterator closes the connection."""
    headers = {**server.http.headers, "X-Request-Id": name}
    with httpx.stream(
        "POST", server.url + "/v1/completions", json=ENDLESS | fields, headers=headers, timeout=60
    ) as response:
        yield response.iter_lines()


def test_health_in_good_times() -> None:
    with served() as server:
        server.client.completions.create(model="", prompt="x|", max_tokens=5)
        assert server.http.get("/health").content == b""
        for path in ("/livez", "/readyz"):
            found = server.http.get(path).json()
            assert found["status"] == "ready" and found["steps"] >= 5 and found["generated_tokens"] == 5
            assert found["seconds_since_token"] >= 0 and found["running"] == 0
        server.service.draining = True
        assert server.http.get("/readyz").status_code == 503 == server.http.get("/health").status_code
        assert server.http.get("/livez").json()["status"] == "draining"


def test_an_engine_that_stands_still_is_not_healthy() -> None:
    """The thread is there and answers nothing: the case in which others say that all is well."""
    with served(Setup(options=ServeOptions(stall_timeout=0.3))) as server:
        blocked = threading.Event()
        server.service.engine._command(lambda: blocked.wait(20) and None, lambda error: None)
        asker = threading.Thread(target=lambda: server.http.post("/v1/completions", json={"prompt": "say:a;|"}))
        asker.start()
        with httpx.Client(base_url=server.url, timeout=60) as other:
            until(lambda: other.get("/livez").status_code == 503)
            assert other.get("/livez").json()["status"] == "stalled"
            assert other.get("/readyz").status_code == 503 == other.get("/health").status_code
            blocked.set()
            asker.join()
            assert other.get("/livez").json()["status"] == "ready" and other.get("/health").is_success


def test_silence_is_counted_from_the_work_or_the_last_step() -> None:
    now = 100.0
    progress = Progress(clock=lambda: now)
    assert progress.silent_for(None) == 0 and progress.silent_for(90.0) == 10
    progress.observe(Stats(steps=1, generated_tokens=1), StepFigures(0, 0, 1, (), {}, ()))
    now = 105.0
    assert progress.silent_for(90.0) == 5 and progress.silent_for(104.0) == 1
    assert progress.report()["seconds_since_token"] == 5


# -------------------------------------------------------------------- one request


def test_what_a_request_does_and_why_it_waits() -> None:
    with served(Setup(delay=0.02, max_num_seqs=1)) as server, streaming(server, "one") as first:
        next(first)
        with streaming_in_thread(server, "two"), streaming_in_thread(server, "three"):
            until(lambda: len(server.service.live) == 3 and server.service.progress.stats.waiting == 2)
            running = server.http.get("/v1/requests/cmpl-one").json()
            assert running["state"] == "decode" and running["queue_position"] is None
            assert running["output_tokens"] > 0 and running["prompt_tokens"] == 3
            places = {}
            for name in ("two", "three"):
                found = server.http.get(f"/v1/requests/{name}").json()
                assert found["state"] == "waiting" and "waits for one of 1 running" in found["why"]
                places[name] = found["queue_position"]
            assert places == {"two": 1, "three": 2}
            for name in ("three", "two", "cmpl-one"):
                cancelled = server.http.delete(f"/v1/requests/{name}").json()
                assert cancelled["cancelled"] is True
                refused(server.http.get(f"/v1/requests/{name}"), 404)
        lines = [line.removeprefix("data: ") for line in first if line]
        assert json.loads(lines[-2])["choices"][0]["finish_reason"] == "abort" and lines[-1] == "[DONE]"
        server.wait_idle()


@contextmanager
def streaming_in_thread(server: Running, name: str) -> Iterator[None]:
    """A request that waits for its first token, begun in the order of the calls."""
    body = {"prompt": "y|", "max_tokens": 50}
    headers = {"X-Request-Id": name}
    before = len(server.service.live)
    thread = threading.Thread(
        target=lambda: httpx.post(server.url + "/v1/completions", json=body, headers=headers, timeout=60)
    )
    thread.start()
    until(lambda: len(server.service.live) > before)
    yield
    thread.join(60)
    assert not thread.is_alive()


def test_a_tenant_sees_only_its_own_requests() -> None:
    with served(Setup(keys=("first", "second"), delay=0.02)) as server, streaming(server, "mine") as response:
        next(response)
        other = {"Authorization": "Bearer second"}
        for method in ("GET", "DELETE"):
            refused(server.http.request(method, "/v1/requests/cmpl-mine", headers=other), 404)
        assert server.http.get("/v1/requests/cmpl-mine").json()["state"] == "decode"
        refused(server.http.get("/v1/requests/nothing"), 404)


def test_why() -> None:
    live = Live()
    requests = [LiveRequest(f"r-{number}", "", 1, 5) for number in range(4)]
    for request in requests:
        live.add(request)
    requests[0].first_output = requests[0].began
    full = Stats(running=1, waiting=2, pages=(100,), free_pages=(2,))
    assert live.describe(requests[1], full, None)["state"] == "prefill"
    found = live.describe(requests[2], full, Place(1, 2.0))
    assert (found["state"], found["queue_position"], found["estimated_wait_seconds"]) == ("waiting", 1, 2.0)
    assert "room in the cache" in str(live.describe(requests[3], full, Place(2, None))["why"])
    assert live.busy_since is not None
    for request in requests:
        request.over = True
    assert live.busy_since is None and len(live) == 0


def test_of_requests_that_are_over_nothing_is_told_and_little_is_kept() -> None:
    live = Live()
    requests = [LiveRequest(f"r-{number}", "", 1, 5, over=number % 10 > 0) for number in range(1000)]
    for request in requests:
        live.add(request)
    assert len(live) == 100 and live.find("r-3", "") is None
    assert len(live._requests) < 300
    later = LiveRequest("r-990", "", 1, 7)
    live.add(later)
    found = live.find("r-990", "")
    assert found is not None and found.prompt_tokens == 7, "the later one of the same id"
    del requests, request, later, found
    assert len(live) == 0 and live.busy_since is None, "whoever should have answered them is gone"


# -------------------------------------------------------------------- the pace of streams


def test_tokens_are_sent_together() -> None:
    with served(Setup(options=ServeOptions(stream_interval=4))) as server:

        def pieces(**fields: Any) -> list[str]:
            body = {"prompt": "x|", "max_tokens": 10, "stream": True} | fields
            lines = server.http.post("/v1/completions", json=body).text.split("\n\n")[:-2]
            return [json.loads(line.removeprefix("data: "))["choices"][0]["text"] for line in lines]

        assert pieces() == ["a", "bcde", "fghi", "j"]
        assert pieces(stream_interval=1) == list("abcdefghij")
        assert pieces(stream_interval=100) == ["a", "bcdefghij"]
        assert sorted(pieces(n=2, temperature=1)) == sorted(["a", "bcde", "fghi", "j"] * 2)


def test_a_silent_stream_says_that_it_is_still_there() -> None:
    options = ServeOptions(sse_keep_alive_interval=0.05)
    with served(Setup(options=options, delay=0.5)) as server:
        with streaming(server, "slow", max_tokens=3) as response:
            lines = [line for line in response if line]
        texts = [json.loads(line[6:])["choices"][0]["text"] for line in lines if line.startswith("data: {")]
        assert texts == list("abc") and lines[-1] == "data: [DONE]"
        assert lines[0].startswith(":") and sum(line.startswith(":") for line in lines) > 3
        assert server.client.completions.create(model="", prompt="say:hello;|", stream=True).response.is_success
        with streaming(server, "gone") as response:
            next(response)
        server.wait_idle()


def test_prompts_are_logged_only_where_that_is_wanted(caplog: pytest.LogCaptureFixture) -> None:
    for most, shown in ((0, False), (6, True)):
        caplog.clear()
        with served(Setup(options=ServeOptions(max_log_len=most))) as server, caplog.at_level(logging.INFO):
            server.service.log_arrivals = True
            server.client.completions.create(model="", prompt="secret zebras say:a;|")
            server.wait_idle()
        assert ("'secret'" in caplog.text) is shown and "zebras" not in caplog.text
        assert "arrived" in caplog.text


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {"prompt": "x" * 50_000}),
        ("/v1/completions", {"prompt": ["x" * 400] * 100, "max_tokens": 1}),
        ("/v1/messages/count_tokens", {"messages": [{"role": "user", "content": "x" * 50_000}]}),
        ("/detokenize", {"tokens": [40] * 50_000}),
    ],
)
def test_long_texts_are_read_beside_the_event_loop(
    monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any]
) -> None:
    """So that health is told meanwhile, and streams go on."""
    threads: list[str] = []

    def noted(name: str) -> None:
        plain = getattr(Tokenizer, name)

        def note(self: Tokenizer, *given: Any, **named: Any) -> Any:
            with contextlib.suppress(RuntimeError):
                asyncio.get_running_loop()
                threads.append(f"{name} in the event loop")
            return plain(self, *given, **named)

        monkeypatch.setattr(Tokenizer, name, note)

    with served() as server:
        noted("encode")
        noted("decode")
        assert server.http.post(path, json=body).status_code == 200
    assert not threads


def test_a_detokenize_has_a_limit() -> None:
    with served() as server:
        assert server.http.post("/detokenize", json={"tokens": [5] * (MOST_TOKENS + 1)}).status_code == 400
