"""The real server with the bundled model: its engine is killed under 64 streams; it drains and ends with its status.

As a program with more kills: python tests/e2e/test_survival.py --kills 20 --tokens 250
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import shutil
import signal
import sys
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import httpx
import pytest

import quire.bundled
from started_server import StartedServer, engine_pid, kill_engine, started_server
from waiting import until, when

pytestmark = pytest.mark.slow

STREAMS = 64
KILLS, TOKENS = 3, 40


@dataclass
class Heard:
    """What one stream brought."""

    text: str = ""
    times: list[float] = field(default_factory=list)
    reason: str | None = None
    error: Any = None


@dataclass
class Survived:
    """What the streams brought without a kill and with kills, and when those were."""

    plain: list[Heard]
    found: list[Heard]
    moments: list[float]

    def lost(self) -> int:
        """Streams that brought anything else than without kills."""
        pairs = zip(self.plain, self.found, strict=True)
        return sum((one.text, one.reason, one.error) != (other.text, other.reason, other.error) for one, other in pairs)

    def line(self) -> str:
        """For people. The pause: the longest time between two tokens of a stream, from a kill until the next one; what
        was on its way when the engine died still comes.
        """
        between = list(zip(self.moments, [*self.moments[1:], math.inf], strict=True))
        gaps = [
            [later - earlier for earlier, later in pairwise(heard.times) if later > moment and earlier < end]
            for heard in self.found
            for moment, end in between
            if heard.times[0] < moment
        ]
        pauses = sorted(max(each) for each in gaps if each)
        return (
            f"{len(self.moments)} kills, {len(self.found)} streams, {self.lost()} differ, pause median "
            f"{pauses[len(pauses) // 2]:.2f} s, p99 {pauses[int(len(pauses) * 0.99)]:.2f} s, longest {pauses[-1]:.2f} s"
        )


async def stream(client: httpx.AsyncClient, index: int, tokens: int, heard: Heard) -> None:
    """One completion: every other one greedy, the others seeded."""
    body = {
        "prompt": f"Once upon a time there were {index} brothers, and",
        "max_tokens": tokens,
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


async def all_streams(server: StartedServer, tokens: int, kills: int, moments: list[float]) -> list[Heard]:
    """Run the streams, killing the engine `kills` times at random moments, which are noted."""
    draw, pid = random.Random(3), server.pid
    found = [Heard() for _ in range(STREAMS)]
    limits = httpx.Limits(max_connections=STREAMS)
    async with httpx.AsyncClient(base_url=server.url, timeout=300, limits=limits) as client:
        tasks = [asyncio.create_task(stream(client, index, tokens, heard)) for index, heard in enumerate(found)]
        for _ in range(kills):
            so_far = sum(len(heard.times) for heard in found)
            moment = so_far + draw.randint(STREAMS // 2, 8 * STREAMS)  # tokens
            while sum(len(heard.times) for heard in found) < moment and not all(task.done() for task in tasks):
                await asyncio.sleep(0.001)
            await when(lambda: engine_pid(pid) is not None)
            moments.append(time.monotonic())
            kill_engine(pid)
        await asyncio.gather(*tasks)
    return found


def survive(server: StartedServer, kills: int, tokens: int) -> Survived:
    """The streams, once without kills and once with."""
    moments: list[float] = []
    plain = asyncio.run(all_streams(server, tokens, 0, moments))
    return Survived(plain, asyncio.run(all_streams(server, tokens, kills, moments)), moments)


def survive_apart(server: StartedServer, kills: int, tokens: int, apart: float) -> Survived:
    """The same with streams of their own for each kill, and so many seconds before: time for a spare process."""
    moments: list[float] = []
    plain, found = asyncio.run(all_streams(server, tokens, 0, moments)), []
    for _ in range(kills):
        time.sleep(apart)
        found += asyncio.run(all_streams(server, tokens, 1, moments))
    return Survived(plain * kills, found, moments)


def test_streams_survive_kills_and_the_server_drains(capsys: pytest.CaptureFixture[str]) -> None:
    with started_server("--shutdown-timeout", "60", rows=STREAMS) as server:
        survived = survive(server, KILLS, TOKENS)
        with capsys.disabled():
            print("\n" + survived.line())
        for before, after in zip(survived.plain, survived.found, strict=True):
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


def main() -> int:
    """As many kills as asked."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=250, help="of each stream")
    parser.add_argument("--apart", type=float, help="seconds before each kill; without, they come in quick succession")
    found = parser.parse_args()
    with started_server("--shutdown-timeout", "60", rows=STREAMS) as server:
        if found.apart is None:
            survived = survive(server, found.kills, found.tokens)
        else:
            survived = survive_apart(server, found.kills, found.tokens, found.apart)
    print(survived.line())
    return 1 if survived.lost() or len(survived.moments) < found.kills else 0


if __name__ == "__main__":
    sys.exit(main())
