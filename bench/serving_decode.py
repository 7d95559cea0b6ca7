"""Decoding through HTTP beside the same through LLM: tokens per second of 32 streams, and the longest step in a while.

python bench/serving_decode.py [--streams 32] [--tokens 128] [--seconds 60]
python bench/serving_decode.py --shape qwen3-0.6b --quantization int8 --tokens 24 --rounds 2 --seconds 0
python bench/serving_decode.py --shape qwen3-0.6b --quantization int8 --tokens 24 --rounds 0    # the steps alone
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import time
from dataclasses import dataclass
from functools import partial

import psutil
from server_process import StartedServer
from serving_ttft import both, parser_of, prompt

from quire import LLM, SamplingParams

IDS = b'"token_ids":['


class Stream(asyncio.Protocol):
    """One stream of tokens: when each came."""

    def __init__(self, request: bytes, ended: asyncio.Future[None]) -> None:
        self.times: list[float] = []
        self._request = request
        self._ended = ended

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ask."""
        assert isinstance(transport, asyncio.Transport)
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        """Note the tokens, of which an event may bring several."""
        for piece in data.split(IDS)[1:]:
            self.times += [time.perf_counter()] * (piece.count(b",", 0, piece.find(b"]")) + 1)

    def connection_lost(self, error: Exception | None) -> None:
        """It is over."""
        if not self._ended.done():
            self._ended.set_result(None)


async def over_http(
    server: StartedServer, streams: int, tokens: int, first: int, each_step: bool = False
) -> list[Stream]:
    """Run so many streams at once. `each_step`: the first one asks for log-probabilities, with which no step's tokens wait
    for those of the next one."""
    loop, found, ends = asyncio.get_running_loop(), [], []
    for number in range(streams):
        body = {"prompt": prompt(first + number, 16), "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        body |= {"stream": True, "return_token_ids": True}
        if each_step and number == 0:
            body["logprobs"] = 0
        content = json.dumps(body).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
        request = head.encode() + b"Content-Length: %d\r\n\r\n" % len(content) + content
        ended = loop.create_future()
        _, stream = await loop.create_connection(partial(Stream, request, ended), server.host, server.port)
        found.append(stream)
        ends.append(ended)
    await asyncio.gather(*ends)
    return found


@dataclass(frozen=True, slots=True)
class Served:
    """One round through HTTP: tokens per second, and the cores that the API process and this client used for it."""

    rate: float
    api: float
    client: float


def served(server: StartedServer, streams: int, tokens: int, first: int) -> Served:
    """The rate of all streams together, from when the last one has begun until the first one ends; cores over the whole."""
    sides = (psutil.Process(server.pid), psutil.Process())
    before, start = [sum(side.cpu_times()[:2]) for side in sides], time.perf_counter()
    found = asyncio.run(over_http(server, streams, tokens, first))
    took = time.perf_counter() - start
    api, client = ((sum(side.cpu_times()[:2]) - used) / took for side, used in zip(sides, before, strict=True))
    began, ended = max(stream.times[0] for stream in found), min(stream.times[-1] for stream in found)
    return Served(sum(began < at <= ended for stream in found for at in stream.times) / (ended - began), api, client)


def llm_rate(llm: LLM, streams: int, tokens: int, first: int) -> float:
    """The same of LLM, where all begin and end together."""
    params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
    prompts = [prompt(first + number, 16) for number in range(streams)]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    times = [output.metrics for output in outputs if output.metrics is not None]
    began, ended = max(item.first_token_ts for item in times), min(item.last_token_ts for item in times)
    return streams * (tokens - 1) / (ended - began)


async def probe(server: StartedServer, found: list[float]) -> None:
    """Milliseconds that /livez takes, twenty times a second."""
    while True:
        began = time.perf_counter()
        reader, writer = await asyncio.open_connection(server.host, server.port)
        writer.write(b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answer = await reader.read()
        writer.close()
        assert b" 200 " in answer[:20], answer[:100]
        found.append((time.perf_counter() - began) * 1000)
        await asyncio.sleep(0.05)


def steps(server: StartedServer, streams: int, tokens: int, seconds: float) -> tuple[list[float], list[float]]:
    """Milliseconds between tokens over so many seconds of service, of one stream beside others, so many tokens each; and
    those of /livez."""
    gaps: list[float] = []
    health: list[float] = []

    async def run() -> None:
        end, first = time.perf_counter() + seconds, 100_000
        prober = asyncio.create_task(probe(server, health))
        while time.perf_counter() < end:
            found = await over_http(server, streams, tokens, first, each_step=True)
            times = found[0].times
            # The beginning, while others' prompts come in, is no step of decoding alone.
            gaps.extend((after - before) * 1000 for before, after in zip(times[8:-1], times[9:], strict=True))
            first += streams
        prober.cancel()

    asyncio.run(run())
    return gaps, sorted(health)


def compare(server: StartedServer, llm: LLM, streams: int, tokens: int, rounds: int) -> None:
    """Print the rates of both."""
    found: list[tuple[Served, float]] = []
    for number in range(rounds + 1):  # the first one warms up
        size = (streams, tokens, number * 1000)
        found.append((served(server, *size), llm_rate(llm, *size)))
    http, plain = zip(*found[1:], strict=True)
    rate, through_llm = statistics.median(one.rate for one in http), statistics.median(plain)
    print(
        f"{streams} streams: {rate:,.0f} tokens/s through HTTP, {through_llm:,.0f} through LLM: "
        f"{rate / through_llm:.1%}; cores used by the API process {statistics.median(one.api for one in http):.2f}, "
        f"by this client {statistics.median(one.client for one in http):.2f}",
        flush=True,
    )


def main() -> None:
    """Measure and print."""
    parser = parser_of(__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="of each side of the comparison; 0 for none")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=60.0, help="of the search for long steps; 0 for none")
    parser.add_argument("--nice", type=int, default=0, help="give the API process's event loop this niceness")
    found = parser.parse_args()
    with both(found, max_num_seqs=found.streams, disable_log_stats=False) as (server, llm):
        if found.nice:
            os.setpriority(os.PRIO_PROCESS, server.pid, found.nice)  # on Linux: of its main thread alone
        if found.rounds:
            compare(server, llm, found.streams, found.tokens, found.rounds)
        if found.seconds:
            gaps, health = steps(server, found.streams, 4 * found.tokens, found.seconds)
            median, longest = statistics.median(gaps), max(gaps)
            slow = sum(gap > 2 * median for gap in gaps)
            print(
                f"{len(gaps)} steps in {found.seconds:.0f} s: median {median:.2f} ms, longest {longest:.2f} ms, {slow} "
                f"above twice the median; /livez p99 {health[int(len(health) * 0.99)]:.1f} ms of {len(health)}"
            )


if __name__ == "__main__":
    main()
