"""Twice as many requests as the server can do: what it does is the same, what it refuses it refuses at once.

The real server over an engine whose model is a clock (bench/fake_engine.py), so its capacity is known.
python tests/e2e/overload.py --minutes 10
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "bench"))

import psutil
from fake_server import fake_server
from server_process import StartedServer

ROWS, STEPS, TOKENS = 16, 60.0, 40  # a capacity of 960 tokens or 24 requests per second
QUEUE = 24  # requests that may wait
HEALTH = ("/livez", "/readyz", "/health")


@dataclass
class Load:
    """What a stretch of time under load came to."""

    seconds: float = 0.0
    tokens: int = 0  # of answers that came to their end
    statuses: Counter[int] = field(default_factory=Counter)
    health: list[float] = field(default_factory=list)  # milliseconds
    memory: list[float] = field(default_factory=list)  # MiB, of the API process, once a second
    descriptors: list[int] = field(default_factory=list)
    without_retry: int = 0  # refusals that do not say when to come again

    @property
    def goodput(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds

    def health_p99(self) -> float:
        """Milliseconds."""
        return sorted(self.health)[int(len(self.health) * 0.99)]


async def ask(server: StartedServer, path: str, body: bytes = b"", key: str = "") -> tuple[int, bytes, bytes]:
    """Status, head and body of an answer, over a connection of its own."""
    reader, writer = await asyncio.open_connection(server.host, server.port)
    try:
        method = b"POST" if body else b"GET"
        head = b"%s %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" % (method, path.encode())
        if key:
            head += b"Authorization: Bearer %s\r\n" % key.encode()
        head += b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
        writer.write(head + body)
        async with asyncio.timeout(60):
            answer = await reader.read()
        top, _, rest = answer.partition(b"\r\n\r\n")
        return int(top.split(b" ", 2)[1]), top.lower(), rest
    finally:
        writer.close()


def body(tokens: int = TOKENS) -> bytes:
    """A request of so many tokens."""
    return json.dumps({"prompt": "Once upon a time", "max_tokens": tokens, "ignore_eos": True, "stream": True}).encode()


async def generate(server: StartedServer, load: Load, key: str = "", tokens: int = TOKENS) -> int:
    """One request; returns its tokens, all of them or none."""
    status, head, rest = await ask(server, "/v1/completions", body(tokens), key)
    load.statuses[status] += 1
    if status != 200:
        load.without_retry += b"retry-after:" not in head
        await asyncio.sleep(0)
        return 0
    done = tokens if b"[DONE]" in rest[-60:] else 0
    load.tokens += done
    return done


async def watch(server: StartedServer, load: Load, end: float) -> None:
    """Ask for the health twenty times a second, look at the process once a second."""
    process, number = psutil.Process(server.pid), 0
    while time.monotonic() < end:
        began = time.monotonic()
        status, _, _ = await ask(server, HEALTH[number % len(HEALTH)])
        load.health.append((time.monotonic() - began) * 1000)
        assert status == 200, status
        if number % 20 == 0:
            load.memory.append(process.memory_info().rss / 2**20)
            load.descriptors.append(process.num_fds())
        number += 1
        await asyncio.sleep(0.05)


async def capacity(server: StartedServer, seconds: float) -> Load:
    """As many clients as rows, each asking again at once."""
    load, end = Load(), time.monotonic() + seconds
    began = time.monotonic()

    async def client() -> None:
        while time.monotonic() < end:
            await generate(server, load)

    await asyncio.gather(*(client() for _ in range(ROWS)))
    load.seconds = time.monotonic() - began
    return load


async def overload(server: StartedServer, seconds: float, rate: float) -> Load:
    """Requests at a steady rate, whatever becomes of them."""
    load, began = Load(), time.monotonic()
    end, tasks = began + seconds, set()
    watcher = asyncio.create_task(watch(server, load, end))
    number = 0
    while time.monotonic() < end:
        number += 1
        task = asyncio.create_task(generate(server, load))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        await asyncio.sleep(max(0.0, began + number / rate - time.monotonic()))
    load.seconds, inside = time.monotonic() - began, load.tokens
    await watcher
    await asyncio.gather(*tasks)
    load.tokens = inside  # what ended within the time
    return load


async def crowd(server: StartedServer, clients: dict[str, int], answers: int, tokens: int = TOKENS) -> dict[str, Load]:
    """So many clients of each key, each asking again soon whatever it got, until there are so many answers."""
    loads = {key: Load() for key in clients}

    async def client(key: str) -> None:
        while True:
            if not await generate(server, loads[key], key, tokens):
                await asyncio.sleep(0.05)  # a port is in use for a while after each connection

    tasks = [asyncio.create_task(client(key)) for key, count in clients.items() for _ in range(count)]
    while sum(load.statuses[200] for load in loads.values()) < answers:
        await asyncio.sleep(0.05)
        assert not any(task.done() for task in tasks), "a client got no answer at all"
        status, _, _ = await ask(server, "/health")
        assert status == 200, status
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return loads


def jain(shares: list[int]) -> float:
    """Jain's index of fairness: 1 when all got the same."""
    return sum(shares) ** 2 / (len(shares) * sum(share**2 for share in shares))


def run(seconds: float) -> tuple[Load, Load]:
    """Capacity, then twice as much."""
    with fake_server(STEPS, ROWS, "--max-num-queued-reqs", str(QUEUE), "--no-engine-spare") as server:
        asyncio.run(capacity(server, 2.0))  # warm
        most = asyncio.run(capacity(server, max(5.0, seconds / 20)))
        return most, asyncio.run(overload(server, seconds, 2 * most.goodput / TOKENS))


def share() -> int:
    """Two keys, one with ten times the clients of the other, which alone fills the engine and a queue."""
    flags = ("--scheduling-policy", "fair", "--api-key", "key0", "key1", "--no-engine-spare")
    with fake_server(STEPS, ROWS, *flags) as server:
        loads = asyncio.run(crowd(server, {"key0": 20 * ROWS, "key1": 2 * ROWS}, 800, tokens=10))
    got = [load.tokens for load in loads.values()]
    print(f"two keys, one with ten times the clients: {got[0]} and {got[1]} tokens, Jain index {jain(got):.3f}")
    return 0 if jain(got) > 0.95 else 1


def line(most: Load, load: Load) -> str:
    """For people."""
    shown = ", ".join(f"{count} x {status}" for status, count in sorted(load.statuses.items()))
    return (
        f"2x overload for {load.seconds:.0f} s: goodput {load.goodput:.0f} of {most.goodput:.0f} tokens/s "
        f"({load.goodput / most.goodput:.0%}), {shown}; "
        f"health p99 {load.health_p99():.1f} ms, longest {max(load.health):.0f} ms of {len(load.health)}; "
        f"memory {load.memory[0]:.0f} -> {load.memory[-1]:.0f} MiB, "
        f"descriptors {load.descriptors[0]} -> {load.descriptors[-1]}"
    )


def main() -> int:
    """For as long as asked."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--keys", action="store_true", help="two keys of which one floods, instead")
    found = parser.parse_args()
    if found.keys:
        return share()
    most, load = run(found.minutes * 60)
    print(line(most, load))
    grown = load.memory[-1] - load.memory[len(load.memory) // 4]
    good = load.goodput > 0.9 * most.goodput and grown < 20 and not load.without_retry
    return 0 if good and load.health_p99() < 50 else 1


if __name__ == "__main__":
    sys.exit(main())
