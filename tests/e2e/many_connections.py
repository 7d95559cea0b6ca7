"""So many connections at once to the real server, which all ask something in the end: what they cost.

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
    left: int  # of those more than before, after all were closed

    def line(self) -> str:
        """For people."""
        return (
            f"{self.connections} connections at once ({self.descriptors} descriptors), {self.answered} answered: "
            f"{self.memory:.0f} MiB, health within {self.health:.1f} ms, {self.left} left when all were closed"
        )


async def measure(server: StartedServer, count: int) -> Many:
    """Open them, ask by each of them, look, close them."""
    process = psutil.Process(server.pid)
    before, descriptors = process.memory_info().rss, process.num_fds()
    found: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
    for start in range(0, count, BATCH):
        batch = (asyncio.open_connection(server.host, server.port) for _ in range(min(BATCH, count - start)))
        found += await asyncio.gather(*batch)
    slowest = 0.0
    for _ in range(20):
        began = time.monotonic()
        reader, writer = await asyncio.open_connection(server.host, server.port)
        writer.write(HEALTH)
        assert (await reader.read()).startswith(b"HTTP/1.1 200")
        slowest = max(slowest, time.monotonic() - began)
        writer.close()
    most = process.num_fds()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        writer.write(ASK)
        return (await reader.readline()).startswith(b"HTTP/1.1 200")

    answered = sum(await asyncio.gather(*(answer(*connection) for connection in found)))
    memory = process.memory_info().rss - before
    for _, writer in found:
        writer.close()
    end = time.monotonic() + 60
    while process.num_fds() > descriptors and time.monotonic() < end:
        await asyncio.sleep(0.05)
    left = max(0, process.num_fds() - descriptors)
    return Many(count, answered, memory / 2**20, slowest * 1000, most, left)


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
    return int(found.answered < count or found.descriptors < count or found.left > 0)


if __name__ == "__main__":
    sys.exit(main())
