"""So many connections at once to the real server, each of which has asked something and stays: what they cost.

python tests/e2e/many_connections.py --connections 10000
"""

from __future__ import annotations

import argparse
import asyncio
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import psutil

from started_server import StartedServer, started_server

BATCH = 200  # connections that are opened at the same moment
SPARE = 200  # descriptors that this process needs besides
ASK = b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n"
HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


@dataclass
class Many:
    """What a server bore."""

    connections: int
    answered: int
    memory: float  # MiB more than before
    health: float  # milliseconds that the slowest of twenty answers took meanwhile
    descriptors: int  # of the server, while all were open
    left: int  # of those, more than before, after all were closed

    def line(self) -> str:
        """For people."""
        return (
            f"{self.connections} connections at once, {self.answered} answered: {self.memory:.0f} MiB, health within "
            f"{self.health:.1f} ms, {self.descriptors} descriptors, {self.left} left when all were closed"
        )


async def measure(server: StartedServer, count: int) -> Many:
    """Open them, ask by each of them, look, close them."""
    process = psutil.Process(server.pid)
    before, descriptors = process.memory_info().rss, process.num_fds()
    writers, answered = [], 0

    async def one() -> asyncio.StreamWriter:
        nonlocal answered
        reader, writer = await asyncio.open_connection(server.host, server.port)
        writer.write(ASK)
        head = await reader.readuntil(b"\r\n\r\n")
        answered += head.startswith(b"HTTP/1.1 200")
        return writer

    for start in range(0, count, BATCH):
        writers += await asyncio.gather(*(one() for _ in range(min(BATCH, count - start))))
    memory, most, slowest = process.memory_info().rss - before, process.num_fds(), 0.0
    for _ in range(20):
        began = time.monotonic()
        reader, writer = await asyncio.open_connection(server.host, server.port)
        writer.write(HEALTH)
        assert (await reader.read()).startswith(b"HTTP/1.1 200")
        slowest = max(slowest, time.monotonic() - began)
        writer.close()
    for writer in writers:
        writer.close()
    end = time.monotonic() + 60
    while process.num_fds() > descriptors and time.monotonic() < end:
        await asyncio.sleep(0.05)
    return Many(count, answered, memory / 2**20, slowest * 1000, most, process.num_fds() - descriptors)


def main() -> int:
    """As many as asked; 1 when one of them was not answered, or something stayed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--connections", type=int, default=10_000)
    count = parser.parse_args().connections
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < count + SPARE:
        parser.error(f"the system allows {hard} open files, too few for {count} connections")
    with started_server("--no-engine-spare", rows=4) as server:  # before the limit of this process is another one
        resource.setrlimit(resource.RLIMIT_NOFILE, (count + SPARE, hard))
        found = asyncio.run(measure(server, count))
    print(found.line())
    return int(found.answered < count or found.left > 0)


if __name__ == "__main__":
    sys.exit(main())
