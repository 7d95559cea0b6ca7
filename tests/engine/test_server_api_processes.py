"""Several API processes before one engine: whichever answers, the server is one; what dies takes only its own along.

Which process gets a connection is the kernel's choice, so every test holds for any choice.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from mixer_server import POISON, SLOW, SLOWER

from started_server import StartedServer, server_process
from waiting import until, when

SERVER = Path(__file__).parent / "mixer_server.py"
COUNT = 2
STREAMS = 24
TOKENS = 40
ENDLESS = 1900  # tokens: half a minute at least for one that is SLOWER
ROWS, QUEUE = 16, 40


@contextmanager
def several(*flags: str) -> Iterator[StartedServer]:
    command = [sys.executable, str(SERVER), "--port", "0", "--api-server-count", str(COUNT), "--no-engine-spare"]
    with server_process([*command, *flags], PYTHONHASHSEED="0") as server:
        yield server


@pytest.fixture(scope="module")
def server() -> Iterator[StartedServer]:
    with several("--max-num-seqs", str(ROWS), "--max-num-queued-reqs", str(QUEUE)) as started:
        yield started


def children(pid: int, word: str) -> list[int]:
    found = [int(pid) for path in Path(f"/proc/{pid}/task").glob("*/children") for pid in path.read_text().split()]
    return sorted(pid for pid in found if word in Path(f"/proc/{pid}/cmdline").read_bytes().decode())


def api_pids(server: StartedServer) -> list[int]:
    return children(server.pid, "quire.serve.api_process")


def engines_of(server: StartedServer) -> list[int]:
    return children(server.pid, SERVER.name)


def owners(server: StartedServer) -> dict[int, int]:
    """The API process that a client's port is connected to."""
    connections = {pid: psutil.Process(pid).net_connections("tcp") for pid in api_pids(server)}
    return {link.raddr.port: pid for pid, links in connections.items() for link in links if link.raddr}


def port_of(response: httpx.Response) -> int:
    """From which the client speaks."""
    return response.extensions["network_stream"].get_extra_info("client_addr")[1]


def each(server: StartedServer, method: str, path: str, **fields: Any) -> list[httpx.Response]:
    """What every API process answers, asked over so many connections that each of them has had one."""
    found: dict[int, httpx.Response] = {}

    def ask(_: int) -> None:
        with httpx.Client(base_url=server.url, verify=False, timeout=60) as client:
            response = client.request(method, path, **fields)
            found[owners(server)[port_of(response)]] = response

    def all_were_asked() -> bool:
        with ThreadPoolExecutor(4 * COUNT) as pool:
            list(pool.map(ask, range(4 * COUNT)))
        return len(found) == COUNT

    until(all_were_asked)
    return list(found.values())


def body(index: int, tokens: int = TOKENS, first: int = SLOW, **more: Any) -> dict[str, Any]:
    seeded = {"temperature": 0.9, "seed": index} if index % 2 else {"temperature": 0.0}
    prompt = [first, 30 + index, 31, 32]
    return {"prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "stream": True, **seeded, **more}


@dataclass
class Stream:
    """What a client has heard so far, how that ended, and the port from which it speaks."""

    tokens: list[int] = field(default_factory=list)
    ending: str = ""
    port: int = field(default=0, compare=False)

    async def listen(self, url: str, wanted: dict[str, Any]) -> None:
        """Hear all of it, over a connection of its own."""
        try:
            async with (
                httpx.AsyncClient(base_url=url, verify=False, timeout=60) as client,
                client.stream("POST", "/v1/completions", json=wanted | {"return_token_ids": True}) as response,
            ):
                self.port = port_of(response)
                if response.status_code == 200:
                    self.ending = await self._hear(response) or "cut"
                else:
                    self.ending = f"{response.status_code} {(await response.aread()).decode()}"
        except httpx.TransportError:
            self.ending = "lost"

    async def _hear(self, response: httpx.Response) -> str | None:
        ending = None
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    return str(chunk["error"]["message"])
                self.tokens += chunk["choices"][0]["token_ids"]
                ending = chunk["choices"][0]["finish_reason"] or ending
        return ending


@asynccontextmanager
async def listening(server: StartedServer, *wanted: dict[str, Any]) -> AsyncIterator[list[Stream]]:
    """Streams at once; what is left of them at the end of the block is given up."""
    streams = [Stream() for _ in wanted]
    tasks = [
        asyncio.create_task(stream.listen(server.url, asked)) for stream, asked in zip(streams, wanted, strict=True)
    ]
    try:
        yield streams
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def connected(streams: list[Stream]) -> None:
    """Wait until each of them knows its port."""
    await when(lambda: all(stream.port for stream in streams))


def run_streams(
    server: StartedServer,
    meanwhile: Callable[[], None] = lambda: None,
    *more: dict[str, Any],
    tokens: int = TOKENS,
    begun: int = STREAMS // 2,
) -> list[Stream]:
    """All of them and some more to their ends, and something else when so many have begun."""

    async def run() -> list[Stream]:
        wanted = [body(index, tokens) for index in range(STREAMS)]
        async with listening(server, *wanted, *more) as streams:
            await when(lambda: sum(bool(stream.tokens) for stream in streams) >= begun)
            await asyncio.to_thread(meanwhile)
            await when(lambda: all(stream.ending for stream in streams))
            return streams

    return asyncio.run(run())


@pytest.fixture(scope="module")
def undisturbed(server: StartedServer) -> list[Stream]:
    found = run_streams(server)
    assert all(stream.ending == "length" and len(stream.tokens) == TOKENS for stream in found)
    return found


def figures(text: str) -> dict[str, float]:
    return {name: float(value) for name, value in re.findall(r"^(\S+) (\S+)$", text, re.MULTILINE)}


def summed(text: str, name: str) -> float:
    """Of all metrics whose names begin so."""
    return sum(value for key, value in figures(text).items() if key.startswith(name))


def idle(server: StartedServer) -> bool:
    """Whether every process takes requests, and the engine has none."""
    answers = each(server, "GET", "/v1/live")
    return all(answer.status_code == 200 and answer.json()["running"] == 0 for answer in answers)


def generated(server: StartedServer) -> float:
    return summed(httpx.get(server.url + "/metrics", timeout=60).text, "quire:generation_tokens_total")


def test_no_stream_notices_the_death_of_the_engine(server: StartedServer, undisturbed: list[Stream]) -> None:
    (before,) = engines_of(server)
    found = run_streams(server, lambda: os.kill(before, signal.SIGKILL))
    assert found == undisturbed
    until(lambda: engines_of(server) not in ([], [before]))
    assert len(api_pids(server)) == COUNT


def test_a_request_that_kills_the_engine_is_ended_alone(server: StartedServer, undisturbed: list[Stream]) -> None:
    *found, killer = run_streams(server, lambda: None, body(0, 10, first=POISON))
    assert "ended the engine more than once" in killer.ending and not killer.tokens
    assert found == undisturbed


@asynccontextmanager
async def one_by_each(server: StartedServer) -> AsyncIterator[dict[int, Stream]]:
    """A stream that does not end, by each API process: begun until each of them has had one."""
    for _ in range(100):
        async with listening(server, *[body(0, ENDLESS, SLOWER)] * 2 * COUNT) as streams:
            await connected(streams)
            owned = owners(server)
            found = {owned[stream.port]: stream for stream in streams}
            if len(found) == COUNT:
                yield found
                return
    pytest.fail("one process gets all connections")


def test_a_process_that_dies_takes_only_its_own_connections(server: StartedServer, undisturbed: list[Stream]) -> None:
    before, wanted = generated(server), [body(index) for index in range(STREAMS)]

    async def run() -> tuple[int, list[Stream]]:
        """One process is killed while each has streams to answer."""
        async with one_by_each(server) as endless, listening(server, *wanted) as streams:
            await connected(streams)
            owned, (killed, *others) = owners(server), endless
            os.kill(killed, signal.SIGKILL)
            await when(lambda: endless[killed].ending and all(stream.ending for stream in streams))
            assert [stream.ending for stream in endless.values()] == ["lost", *[""] * len(others)]
            for index, stream in enumerate(streams):
                assert stream == undisturbed[index] or (stream.ending, owned[stream.port]) == ("lost", killed)
                assert stream.tokens == undisturbed[index].tokens[: len(stream.tokens)]
            return killed, streams

    killed, streams = asyncio.run(run())
    until(lambda: len({*api_pids(server)} - {killed}) == COUNT)
    until(lambda: idle(server))  # its requests end in the engine, and its successor is there
    whole = [stream for stream in streams if stream.ending == "length"]
    until(lambda: generated(server) >= before + TOKENS * len(whole))


def test_counts_are_the_same_whoever_is_asked() -> None:
    wanted = {"quire:generation_tokens_total": TOKENS * STREAMS, 'http_requests_total{handler="/v1/comp': STREAMS}

    def told() -> list[dict[str, float]]:
        texts = [answer.text for answer in each(server, "GET", "/metrics")]
        return [{name: summed(text, name) for name in wanted} for text in texts]

    with several() as server:
        run_streams(server)
        until(lambda: told() == [wanted] * COUNT)  # what the others have counted is told four times a second
        assert [answer.json()["server_load"] for answer in each(server, "GET", "/load")] == [0] * COUNT


def test_a_request_is_found_and_ended_by_any_process(server: StartedServer) -> None:
    wanted, named = body(1, ENDLESS, SLOWER), {"X-Request-Id": "mine"}

    def live() -> list[list[str]]:
        return [[found["id"] for found in answer.json()["requests"]] for answer in each(server, "GET", "/v1/live")]

    with httpx.stream("POST", server.url + "/v1/completions", json=wanted, headers=named, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        for seen in each(server, "GET", "/v1/requests/mine"):
            assert seen.status_code == 200 and seen.json()["state"] == "decode", seen.text
        until(lambda: [answer.json()["server_load"] for answer in each(server, "GET", "/load")] == [1] * COUNT)
        until(lambda: live() == [["cmpl-mine"]] * COUNT)
        gone = httpx.delete(server.url + "/v1/requests/mine", timeout=60)
        assert gone.status_code == 200 and gone.json()["cancelled"]
        assert '"finish_reason":"abort"' in "".join(lines)
    assert [answer.status_code for answer in each(server, "GET", "/v1/requests/mine")] == [404] * COUNT


def test_a_response_is_kept_for_all(server: StartedServer) -> None:
    made = httpx.post(server.url + "/v1/responses", json={"input": "Hello", "max_output_tokens": 5}, timeout=60).json()
    path = f"/v1/responses/{made['id']}"
    assert [answer.json() for answer in each(server, "GET", path)] == [made] * COUNT
    later = {"input": "And?", "max_output_tokens": 3, "previous_response_id": made["id"]}
    assert all(answer.status_code == 200 for answer in each(server, "POST", "/v1/responses", json=later))
    refused = httpx.post(server.url + path + "/cancel", timeout=60)
    assert refused.status_code == 400 and "background" in refused.json()["error"]["message"]
    assert httpx.delete(server.url + path, timeout=60).json()["deleted"]
    assert [answer.status_code for answer in each(server, "GET", path)] == [404] * COUNT


def test_the_queue_is_one(server: StartedServer) -> None:
    """When so many run and so many wait, the next one is refused by all, whoever has taken the others."""

    def waiting() -> list[int]:
        return [answer.json()["waiting"] for answer in each(server, "GET", "/v1/live")]

    async def fill() -> None:
        wanted = body(0, ENDLESS)
        async with listening(server, *[wanted] * ROWS) as running:
            await when(lambda: all(stream.tokens for stream in running))
            async with listening(server, *[wanted] * QUEUE) as others:
                await asyncio.to_thread(until, lambda: waiting() == [QUEUE] * COUNT)
                refused = await asyncio.to_thread(each, server, "POST", "/v1/completions", json=wanted)
                assert [answer.status_code for answer in refused] == [503] * COUNT
                assert not any(stream.ending for stream in running + others)

    asyncio.run(fill())
    until(lambda: idle(server))


@pytest.mark.parametrize("signals", [1, 2])
def test_an_orderly_end(signals: int) -> None:
    """The first signal lets everything finish, the second ends it at once; nothing stays behind."""
    with several("--max-num-seqs", "32") as server:
        pids = [*api_pids(server), *engines_of(server)]

        def refuses() -> bool:
            try:
                return httpx.get(server.url + "/health").status_code == 503
            except httpx.TransportError:
                return True

        def stop() -> None:
            for _ in range(signals):
                server.process.send_signal(signal.SIGTERM)
                until(refuses)  # the signal was heard

        found = run_streams(server, stop, tokens=TOKENS if signals == 1 else ENDLESS, begun=STREAMS)
        if signals == 1:
            assert all(stream.ending == "length" and len(stream.tokens) == TOKENS for stream in found)
        else:
            assert all(stream.ending != "length" for stream in found)
        assert server.process.wait(60) == 0
        until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))


def test_what_cannot_start_is_said() -> None:
    with pytest.raises(SystemExit, match="did not start"), several("--api-server-count", "0"):
        pass
