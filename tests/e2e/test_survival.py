"""The real server with the bundled model: its engine is killed under 64 streams; it drains and ends with its status."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

import quire.bundled
from started_server import engine_pid, kill_engine, started_server
from waiting import until, when

pytestmark = pytest.mark.slow

STREAMS = 64
KILLS = 3


@dataclass
class Heard:
    """What one stream brought."""

    text: str = ""
    times: list[float] = field(default_factory=list)
    reason: str | None = None
    error: Any = None


async def stream(client: httpx.AsyncClient, index: int, heard: Heard) -> None:
    """One completion: every other one greedy, the others seeded."""
    body = {
        "prompt": f"Once upon a time there were {index} brothers, and",
        "max_tokens": 40,
        "ignore_eos": True,
        "temperature": 0.0 if index % 2 else 0.9,
        "seed": index,
        "stream": True,
    }
    async with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            heard.error = chunk.get("error") or heard.error
            for choice in chunk.get("choices", ()):
                heard.text += choice["text"]
                heard.reason = choice["finish_reason"] or heard.reason
                heard.times.append(time.monotonic())


async def all_streams(url: str, pid: int, kills: int) -> tuple[list[Heard], list[float]]:
    """Run the streams, killing the engine `kills` times at random moments."""
    draw, moments = random.Random(3), []
    found = [Heard() for _ in range(STREAMS)]
    limits = httpx.Limits(max_connections=STREAMS)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:
        tasks = [asyncio.create_task(stream(client, index, heard)) for index, heard in enumerate(found)]
        for _ in range(kills):
            so_far = sum(len(heard.times) for heard in found)
            moment = so_far + draw.randint(STREAMS // 2, 8 * STREAMS)  # tokens
            while sum(len(heard.times) for heard in found) < moment and not all(task.done() for task in tasks):
                await asyncio.sleep(0.001)
            await when(lambda: engine_pid(pid) is not None)
            moments.append(time.monotonic())
            kill_engine(pid)
        await asyncio.gather(*tasks)
    return found, moments


def test_streams_survive_kills_and_the_server_drains(capsys: pytest.CaptureFixture[str]) -> None:
    with started_server("--shutdown-timeout", "60", rows=STREAMS) as server:
        plain, _ = asyncio.run(all_streams(server.url, server.process.pid, 0))
        found, moments = asyncio.run(all_streams(server.url, server.process.pid, KILLS))
        pauses = sorted(
            next(at for at in heard.times if at > moment) - moment
            for heard in found
            for moment in moments
            if heard.times[-1] > moment
        )
        lost = sum(before.text != after.text for before, after in zip(plain, found, strict=True))
        with capsys.disabled():
            print(
                f"\n{len(moments)} kills, {STREAMS} streams of the bundled model, {lost} differ, pause median "
                f"{pauses[len(pauses) // 2]:.2f} s, p99 {pauses[int(len(pauses) * 0.99)]:.2f} s"
            )
        for before, after in zip(plain, found, strict=True):
            assert after.error is None and after.reason == before.reason == "length"
            assert after.text == before.text and after.text
        until(lambda: httpx.get(server.url + "/health", timeout=60).status_code == 200)

        # What runs is finished after the signal; then both processes are gone, with status 0.
        engine = engine_pid(server.process.pid)
        body = {"prompt": "Once", "max_tokens": 80, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", server.url + "/v1/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]" and '"length"' in rest[-2]
        assert server.process.wait(60) == 0
        assert engine is not None and not Path(f"/proc/{engine}").exists()


def test_a_second_signal_ends_at_once() -> None:
    body = {"prompt": "Once", "n": STREAMS, "max_tokens": 1500, "ignore_eos": True, "stream": True}
    with (
        started_server("--shutdown-timeout", "100", rows=STREAMS) as server,
        httpx.stream("POST", server.url + "/v1/completions", json=body, timeout=60) as response,
    ):
        lines = response.iter_lines()
        next(lines)
        engine = engine_pid(server.process.pid)
        server.process.send_signal(signal.SIGTERM)
        until(lambda: refuses(server.url))  # the signal was heard
        server.process.send_signal(signal.SIGTERM)
        assert not any('"length"' in line for line in lines), "not all of them can have come to their ends"
        assert server.process.wait(60) == 0
        assert engine is not None and not Path(f"/proc/{engine}").exists()


def refuses(url: str) -> bool:
    """Whether the server takes no new requests."""
    try:
        return httpx.get(url + "/health", timeout=60).status_code == 503
    except httpx.TransportError:
        return True


def test_an_engine_beyond_repair_ends_the_server_with_status_1(tmp_path: Path) -> None:
    """So that whoever supervises the server starts it again, or tells somebody."""
    model = tmp_path / "model"
    shutil.copytree(Path(quire.bundled.__file__).parent / "model", model)
    body = {"prompt": "Once", "n": 16, "max_tokens": 1900, "ignore_eos": True, "stream": True}
    with (
        started_server(str(model), "--no-engine-spare", rows=STREAMS) as server,
        httpx.stream("POST", server.url + "/v1/completions", json=body, timeout=120) as response,
    ):
        lines = response.iter_lines()
        next(lines)
        shutil.rmtree(model)
        kill_engine(server.process.pid)
        rest = [line for line in lines if line]
        assert any("error" in line for line in rest[-2:]), rest[-2:]
        assert server.process.wait(60) == 1
