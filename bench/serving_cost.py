"""What streaming costs: the share of a core that the API process uses, and what it adds to each token.

The engine is a clock of 10,000 tokens per second over 256 streams; each token says when it was made, so its age at the
client is what sending it took: the engine's message, the API process, the socket and the reader.

python bench/serving_cost.py [--streams 256] [--rate 10000] [--seconds 10] [--route chat]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

import psutil
from fake_engine import age
from fake_server import fake_server

PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
MARK = b'"token_ids":['


@dataclass
class Ages:
    """What one window of time brought: the tokens' ages in milliseconds."""

    found: list[float] = field(default_factory=list)
    open: bool = False
    first: int = 0  # streams that have begun


class Reader(asyncio.Protocol):
    """One stream, read with as little work as can be."""

    def __init__(self, request: bytes, ages: Ages) -> None:
        self._request = request
        self._ages = ages
        self._begun = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ask."""
        assert isinstance(transport, asyncio.Transport)
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        """Note the age of each token. A chunk is seldom cut within its ids; one that is, is left out."""
        at = data.find(MARK)
        if at >= 0 and not self._begun:
            self._begun = True
            self._ages.first += 1
        while at >= 0:
            end = data.find(b"]", at)
            if end > 0 and self._ages.open:
                self._ages.found += [age(int(token)) for token in data[at + len(MARK) : end].split(b",") if token]
            at = data.find(MARK, at + 1)


def request(route: str, host: str) -> bytes:
    """A request for a stream that does not end."""
    body = {"max_tokens": 8000, "ignore_eos": True, "stream": True, "return_token_ids": True}
    if route == "chat":
        body["messages"] = [{"role": "user", "content": "Tell me a tale."}]
    else:
        body["prompt"] = "Once upon a time"
    content = json.dumps(body).encode()
    head = f"POST {PATHS[route]} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    return head.encode() + b"Content-Length: %d\r\n\r\n" % len(content) + content


async def measure(host: str, port: int, pid: int, options: argparse.Namespace) -> dict[str, float]:
    """Open the streams, let them come to rest, then count."""
    loop, ages = asyncio.get_running_loop(), Ages()
    for _ in range(options.streams):
        if options.uds is not None:
            await loop.create_unix_connection(lambda: Reader(request(options.route, "x"), ages), options.uds)
        else:
            await loop.create_connection(lambda: Reader(request(options.route, host), ages), host, port)
    while ages.first < options.streams:
        await asyncio.sleep(0.1)
    await asyncio.sleep(1.0)
    api = psutil.Process(pid)
    engine = next(child for child in api.children() if "fake_engine.py" in " ".join(child.cmdline()))
    fronts = [child for child in api.children() if "quire.serve.front" in child.cmdline()]
    sides = ((api, *fronts), (engine,), (psutil.Process(),))
    before = [seconds(side) for side in sides]
    ages.open, began = True, time.monotonic()
    await asyncio.sleep(options.seconds)
    ages.open, took = False, time.monotonic() - began
    after = [seconds(side) for side in sides]
    cores = [(end - start) / took for start, end in zip(before, after, strict=True)]
    found = sorted(ages.found)
    return {
        "tokens_per_second": len(found) / took,
        "api_cores": cores[0],
        "engine_cores": cores[1],
        "client_cores": cores[2],
        "age_ms_median": statistics.median(found),
        "age_ms_p99": found[int(len(found) * 0.99)],
    }


def seconds(processes: Iterable[psutil.Process]) -> float:
    """What these processes have used of the cores so far."""
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--rate", type=float, default=10_000, help="tokens per second over all streams")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--route", choices=sorted(PATHS), default="completions")
    parser.add_argument("--uds", help="a path: listen on a Unix socket there, which costs the system less than TCP")
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    parser.add_argument("flags", nargs="*", help="for the server, behind --")
    options = parser.parse_args()
    flags = ["--no-engine-spare", *options.flags, *(["--uds", options.uds] if options.uds else [])]
    with fake_server(options.rate / options.streams, options.streams, *flags) as server:
        found = asyncio.run(measure(server.host, server.port, server.pid, options))
    if options.json:
        print(json.dumps(found))
        return
    print(
        f"{options.streams} streams of {options.route}: {found['tokens_per_second']:,.0f} tokens/s; the API process uses "
        f"{found['api_cores']:.2f} cores (engine {found['engine_cores']:.2f}, this client {found['client_cores']:.2f}); a "
        f"token arrives {found['age_ms_median']:.2f} ms after it was made at the median, p99 {found['age_ms_p99']:.2f} ms"
    )


if __name__ == "__main__":
    main()
