"""Clients that drop their connections at random moments: for a test, and for `make soak`.

python tests/engine/storms.py --connections 10000
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import os
import random
import socket
import struct
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from served import Running, Setup, served

from waiting import LIMIT

AT_ONCE = 150  # connections
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: the connection is reset instead of closed


@dataclass
class Left:
    """What a storm left behind, and how long that took to go."""

    connections: int
    seconds: float
    settled: float  # seconds from the last connection's end until nothing was left
    descriptors: int  # more than before
    tasks: int

    def line(self) -> str:
        return (
            f"{self.connections} connections dropped at random moments in {self.seconds:.0f} s: all pages free "
            f"{self.settled:.2f} s after the last, tasks left {self.tasks}, descriptors left {self.descriptors}"
        )


def request(draw: random.Random) -> bytes:
    """One of the ways of asking."""
    body: dict[str, Any] = {"max_tokens": draw.choice([1, 20, 400]), "stream": draw.random() < 0.7, "n": 1}
    if draw.random() < 0.5:
        path, body["prompt"] = "/v1/completions", draw.choice(["x|", ["x|", "y|"], "say:hello;|", "crash after 3;|"])
        body["n"] = draw.choice([1, 2])
    elif draw.random() < 0.5:
        path, body["messages"] = "/v1/chat/completions", [{"role": "user", "content": "x"}]
    else:
        path, body["input"] = "/v1/responses", "x"
        body["max_output_tokens"] = body.pop("max_tokens")
        del body["n"]
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


async def drop(port: int, draw: random.Random) -> None:
    """One client that leaves: at once, within the headers or the body, before the answer, or somewhere within it."""
    whole = request(draw)
    body = whole.index(b"\r\n\r\n") + 4
    sent, heard = draw.choice(
        [(0, 0), (draw.randrange(1, body), 0), (draw.randrange(body, len(whole)), 0)]
        + [(len(whole), 0)] * 2
        + [(len(whole), draw.randrange(1, 4000))] * 4
    )
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        if draw.random() < 0.5:
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        writer.write(whole[:sent])
        await asyncio.sleep(draw.random() * 0.02)
        while heard > 0:
            async with asyncio.timeout(10):
                data = await reader.read(heard)
            if not data:
                break
            heard -= len(data)
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def drops(port: int, connections: int, seed: int) -> None:
    """All of them, so many at once."""
    draw, gate = random.Random(seed), asyncio.Semaphore(AT_ONCE)

    async def one() -> None:
        async with gate:
            with contextlib.suppress(OSError, TimeoutError):
                await drop(port, draw)

    async with asyncio.TaskGroup() as group:
        for _ in range(connections):
            group.create_task(one())


def descriptors() -> int:
    """Open files of this process."""
    return len(os.listdir("/proc/self/fd"))


def tasks_of(server: Running) -> int:
    """Tasks in the server's event loop."""
    return sum(len(asyncio.all_tasks(loop)) for loop in server.service.engine._mail)


def storm(connections: int, seed: int = 0) -> Left:
    """Run a server and the storm; fails when something stays."""
    with served(Setup(delay=0.002, max_num_seqs=64)) as server:
        port = int(server.url.rpartition(":")[2])
        for _ in range(2):  # what stays open for good is opened now: processes that render, the clients' pools
            server.client.chat.completions.create(model="", messages=[{"role": "user", "content": "say:hello;"}])
        server.wait_idle()
        before, tasks = descriptors(), tasks_of(server)
        began = time.monotonic()
        asyncio.run(drops(port, connections, seed))
        ended = time.monotonic()
        server.wait_idle()
        settled = time.monotonic() - ended
        stats = server.metrics.stats
        assert stats.free_pages == stats.pages, stats
        assert server.client.completions.create(model="", prompt="say:hello;|").choices[0].text == "hello"
        end = time.monotonic() + LIMIT
        while (descriptors() > before or tasks_of(server) > tasks) and time.monotonic() < end:
            gc.collect()
            time.sleep(0.02)
        return Left(connections, ended - began, settled, descriptors() - before, tasks_of(server) - tasks)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--connections", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    found = parser.parse_args()
    left = storm(found.connections, found.seed)
    print(left.line())
    return 1 if left.descriptors > 0 or left.tasks > 0 else 0


if __name__ == "__main__":
    sys.exit(main())
