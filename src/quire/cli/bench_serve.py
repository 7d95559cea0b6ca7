"""quire bench serve: how fast a server answers, any that speaks the OpenAI API, under a load of made requests.

Reports the times to the first token, between tokens and to the end, under the names that vLLM's users know.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from quire import env
from quire.cli.bench_client import Answer, Server
from quire.cli.flags import FlagParser
from quire.cli.options import section_of
from quire.cli.workloads import FIRST_ORDINARY_ID
from quire.config import option, refuse_nonsense
from quire.errors import ConfigError, QuireError, reason

METRICS = {"ttft": "Time to First Token", "tpot": "Time per Output Token (excl. 1st token)"}
METRICS |= {"itl": "Inter-token Latency", "e2el": "End-to-end Latency"}
WORDS = ("time", "river", "stone", "light", "green", "house", "cloud", "paper", "seven", "music", "north", "glass")


@dataclass(frozen=True, slots=True)
class ServeBenchOptions:
    """Where requests go, what they are, and how they come."""

    backend: Literal["openai", "openai-chat", "vllm"] = option(
        "openai", help="completions with token ids as prompts, or chat completions with words; vllm means openai"
    )
    base_url: str | None = option(None, help="address of the server, instead of host and port")
    host: str = option("127.0.0.1", help="host of the server")
    port: int = option(8000, help="port of the server")
    endpoint: str | None = option(None, help="path; /v1/completions or /v1/chat/completions when not given")
    model: str | None = option(None, help="model's name on the server; the first of /v1/models when not given")
    api_key: str | None = option(None, help="key to show; the variable QUIRE_API_KEY works too")
    dataset_name: Literal["random"] = option("random", help="requests are made of random tokens")
    num_prompts: int = option(1000, help="how many requests", least=1)
    random_input_len: int = option(1024, help="prompt tokens of each request", aliases=("--input-len",), least=1)
    random_output_len: int = option(128, help="output tokens of each request", aliases=("--output-len",), least=1)
    random_range_ratio: float = option(0.0, help="lengths vary by this share up and down")
    random_prefix_len: int = option(0, help="tokens that all prompts begin with, on top of the input length", least=0)
    random_vocab_size: int = option(1000, help="token ids of prompts are below this number")
    request_rate: float = option(float("inf"), help="requests per second; inf sends all at once")
    burstiness: float = option(1.0, help="1 for Poisson arrivals, less for bursts, more for even ones")
    max_concurrency: int | None = option(None, help="most requests under way at once", least=1)
    num_warmups: int = option(1, help="requests sent before, which are not counted", least=0)
    ignore_eos: bool = option(True, help="make all of the output tokens, whatever the model wants")
    temperature: float | None = option(None, help="sampling temperature; the server's own when not given")
    extra_body: dict[str, Any] = option(factory=dict, help="JSON object laid over each request's body")
    seed: int = option(0, help="for prompts and arrivals")
    percentile_metrics: str = option("ttft,tpot,itl,e2el", help="which metrics to report percentiles of")
    metric_percentiles: str = option("50,90,99", help="which percentiles")
    save_result: bool = option(False, help="write a JSON file of the figures")
    save_detailed: bool = option(False, help="with the times of each request")
    result_dir: str = option(".", help="folder of that file")
    result_filename: str | None = option(None, help="its name; made of the time and the model when not given")

    def __post_init__(self) -> None:
        """Raise ConfigError for numbers that mean nothing."""
        refuse_nonsense(self)


@dataclass(frozen=True, slots=True)
class Wanted:
    """One request to make."""

    prompt: list[int]
    output_len: int


@dataclass(slots=True)
class Crowd:
    """How many requests are under way, and how many were at most."""

    now: int = 0
    most: int = 0


def main(argv: Sequence[str]) -> int:
    """Run the command; 1 when every request failed."""
    parser = FlagParser("quire bench serve", "Measure a server under load.")
    parser.add_section(ServeBenchOptions, "load")
    options: ServeBenchOptions = section_of(ServeBenchOptions, parser.parse(argv))
    percentiles = _numbers(options.metric_percentiles)
    wanted = [name.strip() for name in options.percentile_metrics.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in METRICS]
    if unknown:
        raise ConfigError(f"--percentile-metrics names {unknown[0]!r}; there are {', '.join(METRICS)}.")
    if options.request_rate <= 0 or options.burstiness <= 0:
        raise ConfigError("--request-rate and --burstiness must be above 0.")
    if not 0 <= options.random_range_ratio < 1 or options.random_vocab_size <= FIRST_ORDINARY_ID:
        raise ConfigError(f"--random-range-ratio is 0 to below 1, --random-vocab-size more than {FIRST_ORDINARY_ID}.")
    result = asyncio.run(measure(options))
    answers = result.pop("answers")
    result |= figures(answers, result["duration"], percentiles)
    print(report(result, wanted, percentiles))
    for error in sorted({answer.error for answer in answers if answer.error})[:5]:
        print(f"failed: {error}")
    if options.save_result:
        if options.save_detailed:
            result |= _details(answers)
        print(f"written to {save(result, options)}")
    return 0 if result["completed"] else 1


def _numbers(text: str) -> list[float]:
    try:
        found = [float(word) for word in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"--metric-percentiles is {text!r}; write numbers such as 50,90,99.") from error
    if not all(0 < number < 100 for number in found):
        raise ConfigError("--metric-percentiles must be above 0 and below 100.")
    return found


def make_requests(options: ServeBenchOptions) -> list[Wanted]:
    """Random requests, always the same for the same seed."""
    rng = random.Random(options.seed)
    ids = range(FIRST_ORDINARY_ID, options.random_vocab_size)
    prefix = rng.choices(ids, k=options.random_prefix_len)

    def around(length: int) -> int:
        spread = int(length * options.random_range_ratio)
        return max(1, rng.randint(length - spread, length + spread))

    return [
        Wanted(prefix + rng.choices(ids, k=around(options.random_input_len)), around(options.random_output_len))
        for _ in range(options.num_prompts)
    ]


def body_of(request: Wanted, options: ServeBenchOptions, model: str) -> dict[str, Any]:
    """The JSON of one request."""
    body: dict[str, Any] = {"model": model, "stream": True, "stream_options": {"include_usage": True}}
    if options.backend == "openai-chat":
        words = " ".join(WORDS[token % len(WORDS)] for token in request.prompt)
        body |= {"messages": [{"role": "user", "content": words}], "max_completion_tokens": request.output_len}
    else:
        body |= {"prompt": request.prompt, "max_tokens": request.output_len}
    if options.ignore_eos:
        body["ignore_eos"] = True
    if options.temperature is not None:
        body["temperature"] = options.temperature
    return body | options.extra_body


async def measure(options: ServeBenchOptions) -> dict[str, Any]:
    """Send everything; the settings, the duration, and the answers in the order of their requests."""
    keys = (options.api_key,) if options.api_key else env.api_keys()
    server = Server(
        options.base_url or f"http://{options.host}:{options.port}",
        {"Authorization": f"Bearer {keys[0]}"} if keys else {},
    )
    try:
        model = options.model or (await server.get("/v1/models"))["data"][0]["id"]
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise QuireError(
            f"No OpenAI server answers at {server.url}: {reason(error)}. Start one, or check --base-url."
        ) from error
    chat = options.backend == "openai-chat"
    path = options.endpoint or ("/v1/chat/completions" if chat else "/v1/completions")
    requests = make_requests(options)
    for request in requests[: options.num_warmups]:
        answer = await server.stream(path, body_of(request, options, model), len(request.prompt))
        if answer.error:
            raise QuireError(f"The first request failed: {answer.error}")
    gate = asyncio.Semaphore(options.max_concurrency or options.num_prompts)
    crowd = Crowd()

    async def send(request: Wanted) -> Answer:
        async with gate:
            crowd.now += 1
            crowd.most = max(crowd.most, crowd.now)
            try:
                return await server.stream(path, body_of(request, options, model), len(request.prompt))
            finally:
                crowd.now -= 1

    rng, tasks, began = random.Random(options.seed + 1), [], time.perf_counter()
    due = began
    for request in requests:
        tasks.append(asyncio.create_task(send(request)))
        if options.request_rate != float("inf"):
            due += rng.gammavariate(options.burstiness, 1 / (options.request_rate * options.burstiness))
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
    answers = await asyncio.gather(*tasks)
    return {
        "date": datetime.now().strftime("%Y%m%d-%H%M%S"),
        "backend": options.backend,
        "model_id": model,
        "num_prompts": options.num_prompts,
        "request_rate": options.request_rate if options.request_rate != float("inf") else "inf",
        "burstiness": options.burstiness,
        "max_concurrency": options.max_concurrency,
        "duration": time.perf_counter() - began,
        "max_concurrent_requests": crowd.most,
        "answers": answers,
    }


def figures(answers: Sequence[Answer], duration: float, percentiles: Sequence[float]) -> dict[str, Any]:
    """Throughput, and the statistics of each metric in milliseconds."""
    good = [answer for answer in answers if not answer.error]
    given, made = sum(answer.prompt_tokens for answer in good), sum(answer.output_tokens for answer in good)
    found: dict[str, Any] = {
        "completed": len(good),
        "failed": len(answers) - len(good),
        "total_input_tokens": given,
        "total_output_tokens": made,
        "request_throughput": len(good) / duration,
        "output_throughput": made / duration,
        "total_token_throughput": (given + made) / duration,
    }
    values = {
        "ttft": [answer.first for answer in good],
        "tpot": [answer.per_token for answer in good if answer.output_tokens > 1],
        "itl": [gap for answer in good for gap in answer.gaps],
        "e2el": [answer.whole for answer in good],
    }
    for name, seconds in values.items():
        times = sorted(1e3 * second for second in seconds)
        found[f"mean_{name}_ms"] = statistics.fmean(times) if times else 0.0
        found[f"median_{name}_ms"] = percentile(times, 50)
        found[f"std_{name}_ms"] = statistics.pstdev(times) if times else 0.0
        for share in percentiles:
            found[f"p{share:g}_{name}_ms"] = percentile(times, share)
    return found


def percentile(times: Sequence[float], share: float) -> float:
    """The value below which `share` percent of the sorted values lie, between neighbours in proportion; 0 for none."""
    if not times:
        return 0.0
    place = (len(times) - 1) * share / 100
    low = int(place)
    high = min(low + 1, len(times) - 1)
    return times[low] + (times[high] - times[low]) * (place - low)


def report(result: dict[str, Any], wanted: Sequence[str], percentiles: Sequence[float]) -> str:
    """The figures for people."""
    rows: list[tuple[str, float]] = [
        ("Successful requests", result["completed"]),
        ("Failed requests", result["failed"]),
        ("Benchmark duration (s)", result["duration"]),
        ("Total input tokens", result["total_input_tokens"]),
        ("Total generated tokens", result["total_output_tokens"]),
        ("Request throughput (req/s)", result["request_throughput"]),
        ("Output token throughput (tok/s)", result["output_throughput"]),
        ("Total token throughput (tok/s)", result["total_token_throughput"]),
        ("Peak concurrent requests", result["max_concurrent_requests"]),
    ]
    lines = [f"{' Serving Benchmark Result ':=^56}", *map(_row, rows)]
    for name in wanted:
        lines.append(f"{' ' + METRICS[name] + ' ':-^56}")
        short = name.upper()
        lines.append(_row((f"Mean {short} (ms)", result[f"mean_{name}_ms"])))
        lines.append(_row((f"Median {short} (ms)", result[f"median_{name}_ms"])))
        lines += [_row((f"P{share:g} {short} (ms)", result[f"p{share:g}_{name}_ms"])) for share in percentiles]
    return "\n".join([*lines, "=" * 56])


def _row(row: tuple[str, float]) -> str:
    name, value = row
    return f"{name + ':':<40} {value:>15}" if isinstance(value, int) else f"{name + ':':<40} {value:>15.2f}"


def _details(answers: Sequence[Answer]) -> dict[str, Any]:
    return {
        "input_lens": [answer.prompt_tokens for answer in answers],
        "output_lens": [answer.output_tokens for answer in answers],
        "ttfts": [answer.first for answer in answers],
        "itls": [answer.gaps for answer in answers],
        "errors": [answer.error for answer in answers],
    }


def save(result: dict[str, Any], options: ServeBenchOptions) -> Path:
    """Write the figures; the file's path."""
    model = result["model_id"].replace("/", "-")
    name = options.result_filename or f"{options.backend}-{result['request_rate']}qps-{model}-{result['date']}.json"
    path = Path(options.result_dir) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return path
