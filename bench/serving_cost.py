"""What streaming costs: the share of a core that the API process uses, and what it adds to each token.

The engine is a clock of 10,000 tokens per second over 256 streams; each token says when it was made. Two ages are told:
when the system put the token into the client's socket, which is what quire and the system took (the engine's message, the
API process, the sending), and when the client had read it, which on few cores says as much about the client.

python bench/serving_cost.py [--streams 256] [--rate 10000] [--seconds 10] [--route chat]
"""

from __future__ import annotations

import argparse
import json
import selectors
import socket
import statistics
import struct
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import psutil
from fake_engine import age
from fake_server import fake_server

PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
MARK = b'"token_ids":['
SO_TIMESTAMPNS = 35  # Linux: when the system got what is read, in seconds and nanoseconds of time.time()


class Stream:
    """One stream, read with as little work as can be."""

    def __init__(self, options: argparse.Namespace, host: str, port: int) -> None:
        if options.uds is not None:
            self.socket = socket.socket(socket.AF_UNIX)
            self.socket.connect(options.uds)
        else:
            self.socket = socket.create_connection((host, port))
            self.socket.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)  # Unix sockets have no stamps
        self.begun = False
        self.socket.sendall(request(options.route, host))

    def read(self) -> list[Age]:
        """What has come. Ids that are cut by the end of the data are left out, which is seldom."""
        data, extra, _, _ = self.socket.recvmsg(2**16, 64)
        now = time.monotonic()
        arrived = now
        for _, kind, stamp in extra:
            if kind == SO_TIMESTAMPNS:
                seconds, nanoseconds = struct.unpack("qq", stamp)
                arrived = seconds + nanoseconds / 1e9 - time.time() + time.monotonic()
        found = []
        at = data.find(MARK)
        while at >= 0:
            self.begun = True
            end = data.find(b"]", at)
            if end > 0:
                tokens = [int(token) for token in data[at + len(MARK) : end].split(b",") if token]
                found += [Age(age(token, arrived), age(token, now)) for token in tokens]
            at = data.find(MARK, at + 1)
        return found


class Age(NamedTuple):
    """Milliseconds since a token was made."""

    arrived: float  # in the client's socket
    read: float


def request(route: str, host: str) -> bytes:
    """A request for a stream that does not end."""
    body: dict[str, object] = {"max_tokens": 8000, "ignore_eos": True, "stream": True, "return_token_ids": True}
    if route == "chat":
        body["messages"] = [{"role": "user", "content": "Tell me a tale."}]
    else:
        body["prompt"] = "Once upon a time"
    content = json.dumps(body).encode()
    head = f"POST {PATHS[route]} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    return head.encode() + b"Content-Length: %d\r\n\r\n" % len(content) + content


def listen(streams: list[Stream], until: Callable[[], bool]) -> list[Age]:
    """Read the streams until that is so."""
    found: list[Age] = []
    with selectors.DefaultSelector() as selector:
        for stream in streams:
            selector.register(stream.socket, selectors.EVENT_READ, stream)
        while not until():
            for key, _ in selector.select(0.1):
                found += key.data.read()
    return found


def measure(streams: list[Stream], pid: int, options: argparse.Namespace) -> dict[str, float]:
    """Let the streams begin and come to rest, then count."""
    listen(streams, lambda: all(stream.begun for stream in streams))
    rest = time.monotonic() + 1.0
    listen(streams, lambda: time.monotonic() > rest)
    api = psutil.Process(pid)
    engine = next(child for child in api.children() if "fake_engine.py" in " ".join(child.cmdline()))
    api_processes = [child for child in api.children() if "quire.serve.api_process" in child.cmdline()]
    sides = ((api, *api_processes), (engine,), (psutil.Process(),))
    before, began = [seconds(side) for side in sides], time.monotonic()
    ages = listen(streams, lambda: time.monotonic() > began + options.seconds)
    took = time.monotonic() - began
    cores = [(end - start) / took for start, end in zip(before, map(seconds, sides), strict=True)]
    arrived, read = sorted(found.arrived for found in ages), sorted(found.read for found in ages)
    return {
        "tokens_per_second": len(ages) / took,
        "api_cores": cores[0],
        "api_us_per_token": 1e6 * cores[0] * took / len(ages),
        "engine_cores": cores[1],
        "client_cores": cores[2],
        "arrived_ms_median": statistics.median(arrived),
        "arrived_ms_p99": arrived[int(len(arrived) * 0.99)],
        "read_ms_median": statistics.median(read),
        "read_ms_p99": read[int(len(read) * 0.99)],
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
        streams = [Stream(options, server.host, server.port) for _ in range(options.streams)]
        found = measure(streams, server.pid, options)
    if options.json:
        print(json.dumps(found))
        return
    print(
        f"{options.streams} streams of {options.route}: {found['tokens_per_second']:,.0f} tokens/s\n"
        f"cores used: API process {found['api_cores']:.2f} ({found['api_us_per_token']:.0f} us a token), "
        f"engine {found['engine_cores']:.2f}, this client {found['client_cores']:.2f}\n"
        f"milliseconds from a token's making until it is in the client's socket: {found['arrived_ms_median']:.2f} at the "
        f"median, {found['arrived_ms_p99']:.2f} at p99; until it is read: {found['read_ms_median']:.2f}, "
        f"{found['read_ms_p99']:.2f}"
    )


if __name__ == "__main__":
    main()
