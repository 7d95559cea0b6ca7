"""The server under load: tenants that share it, deadlines, and answers that say when to come back."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import cycle
from typing import Any

import httpx
import pytest
from served import Running, Setup, refused, served

from quire.config import ServeOptions
from waiting import until

STEP = 0.02  # seconds
SLOW = Setup(keys=("flood", "small"), delay=STEP, max_num_seqs=2)
ENDLESS = {"prompt": "x|", "max_tokens": 400}


def post(server: Running, body: dict[str, Any], key: str = "flood", **headers: str) -> httpx.Response:
    """A completion asked for with one of the keys."""
    headers = {"Authorization": f"Bearer {key}", **headers}
    return httpx.post(server.url + "/v1/completions", json=body, headers=headers, verify=False, timeout=60)


@contextmanager
def flooded(server: Running, count: int, tokens: int = 400, waiting: int = 0) -> Iterator[None]:
    """While the block runs, one tenant has sent so many requests, again where one was refused. They are cancelled at its
    end."""
    over = threading.Event()

    def insist(name: str) -> None:
        while post(server, ENDLESS | {"max_tokens": tokens}, **{"X-Request-Id": name}).status_code == 503:
            if over.wait(STEP):
                return

    with ThreadPoolExecutor(count) as pool:
        names = [f"flood-{number}" for number in range(count)]
        jobs = [pool.submit(insist, name) for name in names]
        until(lambda: server.metrics.stats.waiting >= (waiting or count - 2))
        try:
            yield
        finally:
            over.set()
            while not all(job.done() for job in jobs):
                for name in names:
                    server.http.delete(f"/v1/requests/cmpl-{name}")
    server.wait_idle()


def test_a_flood_does_not_starve_another_key() -> None:
    """Sixty long requests wait; another key's request has its turn with the next slot, not after them all."""
    with served(SLOW) as server, flooded(server, 60, tokens=100, waiting=40):
        before = server.metrics.stats.waiting
        assert post(server, {"prompt": "say:hello;|"}, "small").json()["choices"][0]["text"] == "hello"
        assert server.metrics.stats.waiting > before / 2


def test_the_place_in_the_queue_is_that_of_the_tenant() -> None:
    with served(SLOW) as server, flooded(server, 20):
        mine = threading.Thread(target=post, args=(server, ENDLESS, "small"), kwargs={"X-Request-Id": "mine"})
        mine.start()
        own = {"Authorization": "Bearer small"}

        def found() -> dict[str, Any]:
            return server.http.get("/v1/requests/cmpl-mine", headers=own).json()

        until(lambda: found().get("state") == "waiting")
        assert found()["queue_position"] <= 2 and "are before it" in found()["why"]
        last = server.http.get("/v1/requests/cmpl-flood-19").json()
        places = [server.http.get(f"/v1/requests/cmpl-flood-{number}").json()["queue_position"] for number in range(20)]
        assert sorted({*places, found()["queue_position"]} - {None}) == list(range(1, 20)) and places.count(None) == 2
        until(lambda: server.http.get("/v1/requests/cmpl-flood-19").json()["estimated_wait_seconds"] is not None)
        assert last["state"] == "waiting"
        server.http.delete("/v1/requests/cmpl-mine", headers=own)
        mine.join(60)


@pytest.mark.parametrize("how", ["field", "header"])
def test_time_over(how: str) -> None:
    """A request that runs when its time is over ends, says so, and holds nothing any more."""
    with served(Setup(delay=STEP)) as server:
        began = time.monotonic()
        if how == "field":
            answer = server.http.post("/v1/completions", json=ENDLESS | {"timeout": 0.5})
        else:
            answer = server.http.post("/v1/completions", json=ENDLESS, headers={"X-Request-Timeout": "0.5"})
        error = refused(answer, 408)
        assert time.monotonic() - began >= 0.5
        assert (
            error["type"] == "RequestTimeoutError"
            and error["param"] == "timeout"
            and "time was over" in error["message"]
        )
        server.wait_idle()
        stats = server.metrics.stats
        assert stats.free_pages == stats.pages
        assert server.http.post("/v1/completions", json={"prompt": "say:hello;|", "timeout": 30}).is_success


def test_time_over_in_a_stream() -> None:
    """What came before is sent; the error is the last event but [DONE]."""
    with served(Setup(delay=STEP)) as server:
        answer = server.http.post("/v1/completions", json=ENDLESS | {"timeout": 1.0, "stream": True})
        events = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
        assert answer.status_code == 200 and events[-1] == "[DONE]"
        assert json.loads(events[-2])["error"]["code"] == 408
        said = "".join(json.loads(event)["choices"][0]["text"] for event in events[:-2])
        assert said and ("abcdefghij" * 40).startswith(said)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/messages"])
def test_every_route_takes_a_time(path: str) -> None:
    with served(Setup(delay=STEP)) as server:
        turn = [{"role": "user", "content": "hi"}]
        answer = server.http.post(path, json={"messages": turn, "input": "hi", "max_tokens": 400, "timeout": 0.5})
        assert answer.status_code == 408 and "time was over" in answer.text


def test_times_that_make_no_sense() -> None:
    with served() as server:
        for timeout in (0, -3, "soon", 1e300):
            assert (
                refused(server.http.post("/v1/completions", json=ENDLESS | {"timeout": timeout}))["param"] == "timeout"
            )
        for header in ("soon", "-1", "nan", "inf"):
            answer = server.http.post("/v1/completions", json=ENDLESS, headers={"X-Request-Timeout": header})
            assert refused(answer)["param"] in ("timeout", "x-request-timeout")


def test_too_little_time_for_the_queue_is_refused_at_once() -> None:
    with served(SLOW) as server, flooded(server, 30):
        until(lambda: server.service.engine.engine._admission.pace is not None)
        answer = post(server, ENDLESS | {"timeout": 1.0})
        error = refused(answer, 429)
        assert error["type"] == "TooManyRequestsError" and "could not begin within the " in error["message"]
        assert int(answer.headers["retry-after"]) >= 2  # 28 requests wait, 2 run at once


def test_a_full_queue_says_when_to_come_back() -> None:
    setup = Setup(keys=("flood", "small"), delay=STEP, max_num_seqs=2, settings={"max_num_queued_reqs": 10})
    with served(setup) as server, flooded(server, 14, waiting=10):
        until(lambda: server.service.engine.engine._admission.pace is not None)
        answer = post(server, ENDLESS)
        assert refused(answer, 503)["type"] == "ServiceUnavailableError"
        assert int(answer.headers["retry-after"]) >= 2
        assert post(server, {"prompt": "x|", "max_tokens": 1, "timeout": 20}, "small").status_code != 503


def test_the_account_counts_restarts() -> None:
    with served() as server:
        body = {"prompt": "say:hello;|", "include_account": True}
        assert server.http.post("/v1/completions", json=body).json()["usage"]["quire"]["restarts"] == 0


def test_a_clock_that_is_set_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deadlines, health and accounts are told by the clock that nobody sets; here the other one jumps by years."""
    years, real = cycle((3e8, -3e8, 0.0)), time.time
    with served(Setup(delay=0.002, options=ServeOptions(stall_timeout=60.0))) as server:
        monkeypatch.setattr(time, "time", lambda: real() + next(years))
        for _ in range(3):
            body = {"prompt": "x|", "max_tokens": 60, "timeout": 60.0, "include_account": True}
            answer = post(server, body)
            assert answer.status_code == 200, answer.text
            assert all(0 <= answer.json()["usage"]["quire"][name] < 60_000 for name in ("queue_ms", "total_ms"))
            assert server.http.get("/health").status_code == 200
        late = post(server, ENDLESS | {"timeout": 0.05})
        assert late.status_code in (408, 429), late.text
