"""Several API processes before one engine: whichever answers, the server is one; what dies takes only its own along."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from mixer_server import POISON, SLOW

sys.path.insert(0, str(Path(__file__).parent.parent))

from started_server import StartedServer, server_process

SERVER = Path(__file__).parent / "mixer_server.py"
COUNT = 2
STREAMS = 24
ENOUGH = 12  # fresh connections after which no process can be expected to have had none


@contextmanager
def fronts(*flags: str) -> Iterator[StartedServer]:
    command = [
        sys.executable,
        str(SERVER),
        "--port",
        "0",
        "--api-server-count",
        str(COUNT),
        "--no-engine-spare",
        *flags,
    ]
    with server_process(command, PYTHONHASHSEED="0") as server:
        yield server


@pytest.fixture(scope="module")
def server() -> Iterator[StartedServer]:
    with fronts("--max-num-seqs", "16", "--max-num-queued-reqs", "40") as started:
        yield started


def children(pid: int, word: str) -> list[int]:
    found = [int(pid) for path in Path(f"/proc/{pid}/task").glob("*/children") for pid in path.read_text().split()]
    return sorted(pid for pid in found if word in Path(f"/proc/{pid}/cmdline").read_bytes().decode())


def front_pids(server: StartedServer) -> list[int]:
    return children(server.pid, "quire.serve.front")


def engine_of(server: StartedServer) -> int:
    return children(server.pid, SERVER.name)[0]


def body(index: int, tokens: int = 60, first: int = SLOW, **more: Any) -> dict[str, Any]:
    seeded = {"temperature": 0.9, "seed": index} if index % 2 else {"temperature": 0.0}
    prompt = [first, 30 + index, 31, 32]
    return {"prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "stream": True, **seeded, **more}


async def one(url: str, wanted: dict[str, Any], tokens: list[int]) -> str:
    """A stream over a connection of its own, with its tokens as they come. Returns how it ended."""
    try:
        async with (
            httpx.AsyncClient(base_url=url, timeout=60) as client,
            client.stream("POST", "/v1/completions", json=wanted | {"return_token_ids": True}) as response,
        ):
            if response.status_code != 200:
                return f"{response.status_code} {(await response.aread()).decode()}"
            ending = "cut"
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    chunk = json.loads(line.removeprefix("data: "))
                    if "error" in chunk:
                        return str(chunk["error"]["message"])
                    tokens += chunk["choices"][0]["token_ids"]
                    ending = chunk["choices"][0]["finish_reason"] or ending
            return ending
    except httpx.TransportError:
        return "lost"


async def several(url: str, meanwhile: Callable[[], None], wanted: list[dict[str, Any]]) -> list[tuple[str, list[int]]]:
    """All of these at once, and something else when each has some tokens."""
    heard: list[list[int]] = [[] for _ in wanted]
    tasks = [asyncio.create_task(one(url, asked, tokens)) for asked, tokens in zip(wanted, heard, strict=True)]
    while not all(heard[: STREAMS // 2]):
        await asyncio.sleep(0.01)
    await asyncio.to_thread(meanwhile)
    return list(zip(await asyncio.gather(*tasks), heard, strict=True))


def run_streams(
    server: StartedServer, meanwhile: Callable[[], None] = lambda: None, *more: dict[str, Any]
) -> list[tuple[str, list[int]]]:
    return asyncio.run(several(server.url, meanwhile, [body(index) for index in range(STREAMS)] + list(more)))


@pytest.fixture(scope="module")
def undisturbed(server: StartedServer) -> list[tuple[str, list[int]]]:
    found = run_streams(server)
    assert all(ending == "length" and len(tokens) == 60 for ending, tokens in found)
    return found


def until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def figures(server: StartedServer) -> dict[str, float]:
    text = httpx.get(server.url + "/metrics").text
    return {name: float(value) for name, value in re.findall(r"^(\S+) (\S+)$", text, re.MULTILINE)}


def generated(server: StartedServer) -> float:
    return next(value for name, value in figures(server).items() if name.startswith("quire:generation_tokens_total"))


def test_no_stream_notices_the_death_of_the_engine(server: StartedServer, undisturbed: list[Any]) -> None:
    before = engine_of(server)
    found = run_streams(server, lambda: os.kill(before, signal.SIGKILL))
    assert found == undisturbed
    assert engine_of(server) != before and len(front_pids(server)) == COUNT


def test_a_request_that_kills_the_engine_is_ended_alone(server: StartedServer, undisturbed: list[Any]) -> None:
    *found, (ending, tokens) = run_streams(server, lambda: None, body(0, 10, first=POISON))
    assert "ended the engine more than once" in ending and not tokens
    assert found == undisturbed


def test_a_process_that_dies_takes_only_its_own_connections(server: StartedServer, undisturbed: list[Any]) -> None:
    count, killed = generated(server), []

    def kill() -> None:
        killed.append(max(front_pids(server), key=lambda pid: len(psutil.Process(pid).net_connections("tcp"))))
        os.kill(killed[0], signal.SIGKILL)

    found = run_streams(server, kill)
    lost = [index for index, (ending, _) in enumerate(found) if ending == "lost"]
    assert 0 < len(lost) < STREAMS
    for index, (before, now) in enumerate(zip(undisturbed, found, strict=True)):
        assert index in lost or now == before
        assert now[1] == before[1][: len(now[1])]
    until(lambda: len(front_pids(server)) == COUNT and killed[0] not in front_pids(server))
    until(lambda: httpx.get(server.url + "/v1/live").json()["running"] == 0, 5)  # its requests end in the engine
    # What it had counted stays counted, but for its last quarter of a second.
    until(lambda: generated(server) >= count + 60 * (STREAMS - len(lost)) - 30 * len(lost))


def test_counts_are_the_same_whoever_is_asked(server: StartedServer, undisturbed: list[Any]) -> None:
    def all_of(name: str) -> list[float]:
        return [sum(value for key, value in figures(server).items() if key.startswith(name)) for _ in range(ENOUGH)]

    names = ("quire:generation_tokens_total", 'http_requests_total{handler="/v1/completions"')
    before = [all_of(name)[-1] for name in names]
    run_streams(server)
    time.sleep(0.6)  # what the others have counted is told four times a second
    for name, least, more in zip(names, before, (60 * STREAMS, STREAMS), strict=True):
        assert set(all_of(name)) == {least + more}, name
    assert {httpx.get(server.url + "/load").json()["server_load"] for _ in range(ENOUGH)} == {0}


def test_a_request_is_found_and_ended_by_any_process(server: StartedServer) -> None:
    wanted = body(1, 1500)
    with httpx.stream(
        "POST", server.url + "/v1/completions", json=wanted, headers={"X-Request-Id": "mine"}
    ) as response:
        lines = response.iter_lines()
        next(lines)
        for _ in range(ENOUGH):
            seen = httpx.get(server.url + "/v1/requests/mine")
            assert seen.status_code == 200 and seen.json()["state"] == "decode", seen.text
        time.sleep(0.5)
        assert {httpx.get(server.url + "/load").json()["server_load"] for _ in range(ENOUGH)} == {1}
        httpx.get(server.url + "/v1/live")
        time.sleep(0.3)
        named = [
            [found["id"] for found in httpx.get(server.url + "/v1/live").json()["requests"]] for _ in range(ENOUGH)
        ]
        assert ["cmpl-mine"] in named and all(ids in ([], ["cmpl-mine"]) for ids in named)
        gone = httpx.delete(server.url + "/v1/requests/mine")
        assert gone.status_code == 200 and gone.json()["cancelled"]
        assert '"finish_reason":"abort"' in "".join(lines)
    for _ in range(ENOUGH):
        assert httpx.get(server.url + "/v1/requests/mine").status_code == 404


def test_a_response_is_kept_for_all(server: StartedServer) -> None:
    made = httpx.post(server.url + "/v1/responses", json={"input": "Hello", "max_output_tokens": 5}).json()
    for _ in range(ENOUGH):
        assert httpx.get(server.url + f"/v1/responses/{made['id']}").json() == made
        wanted = {"input": "And?", "max_output_tokens": 3, "previous_response_id": made["id"]}
        assert httpx.post(server.url + "/v1/responses", json=wanted).status_code == 200
    refused = httpx.post(server.url + f"/v1/responses/{made['id']}/cancel")
    assert refused.status_code == 400 and "background" in refused.json()["error"]["message"]
    assert httpx.delete(server.url + f"/v1/responses/{made['id']}").json()["deleted"]
    for _ in range(ENOUGH):
        assert httpx.get(server.url + f"/v1/responses/{made['id']}").status_code == 404


def test_the_queue_is_one(server: StartedServer) -> None:
    """Up to 16 run, 40 wait: all others are refused, however they are spread over the processes."""
    wanted = [body(index, 40) for index in range(90)]
    found = asyncio.run(several(server.url, lambda: None, wanted))
    endings = [ending[:6].strip() for ending, _ in found]
    assert set(endings) == {"length", '503 {"'}
    # Who comes before the first step waits, too. What arrives at two processes at the same moment is counted by neither.
    assert 40 <= endings.count("length") <= 60, endings.count("length")


@pytest.mark.parametrize("signals", [1, 2])
def test_an_orderly_end(signals: int) -> None:
    """The first signal lets everything finish, the second ends it at once; nothing stays behind."""
    with fronts("--max-num-seqs", "32") as server:
        pids = [*front_pids(server), engine_of(server)]

        def stop() -> None:
            for _ in range(signals):
                server.process.send_signal(signal.SIGTERM)
                time.sleep(0.3)

        wanted = [body(index, 60 if signals == 1 else 1900) for index in range(STREAMS)]
        found = asyncio.run(several(server.url, stop, wanted))
        if signals == 1:
            assert all(ending == "length" and len(tokens) == 60 for ending, tokens in found)
        else:
            assert all(ending != "length" for ending, _ in found)
        assert server.process.wait(15) == 0
        assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_what_cannot_start_is_said() -> None:
    with pytest.raises(SystemExit, match="did not start"), fronts("--api-server-count", "0"):
        pass
