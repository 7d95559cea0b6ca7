"""Time to the first token through HTTP minus the same through LLM, request by request in turn, on an idle machine.

python bench/serving_ttft.py [--requests 40] [--shape qwen3-0.6b --quantization int8]
"""

from __future__ import annotations

import argparse
import http.client
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from server_process import StartedServer, server_process
from shapes import SHAPES, write_shape

from quire import LLM, SamplingParams


def prompt(number: int, words: int) -> list[int]:
    """A prompt that no cache knows, as token ids of any model."""
    return [100 + (number * 977 + index * 31) % 3800 for index in range(words)]


def over_http(connection: http.client.HTTPConnection, ids: list[int]) -> float:
    """Milliseconds until the first event of a stream."""
    body = json.dumps({"prompt": ids, "max_tokens": 2, "temperature": 0, "ignore_eos": True, "stream": True})
    began = time.perf_counter()
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    answer.readline()
    took = time.perf_counter() - began
    answer.read()
    return took * 1000


def over_llm(llm: LLM, ids: list[int]) -> float:
    """Milliseconds until the first token."""
    params = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)
    began = time.perf_counter()
    llm.generate({"prompt_token_ids": ids}, params, use_tqdm=False)
    return (time.perf_counter() - began) * 1000


def compare(server: StartedServer, llm: LLM, requests: int, words: int) -> tuple[list[float], list[float]]:
    """Times of both, in turn."""
    connection = http.client.HTTPConnection(server.host, server.port, timeout=60)
    found: tuple[list[float], list[float]] = ([], [])
    for number in range(requests + 3):
        pair = over_http(connection, prompt(number, words)), over_llm(llm, prompt(number, words))
        if number >= 3:
            for times, value in zip(found, pair, strict=True):
                times.append(value)
    connection.close()
    return found


def parser_of(text: str | None) -> argparse.ArgumentParser:
    """The flags that say which model."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shape", choices=sorted(SHAPES), help="random weights of this shape; the bundled model without"
    )
    parser.add_argument("--quantization")
    parser.add_argument("--threads", type=int)
    return parser


@contextmanager
def both(found: argparse.Namespace, **options: Any) -> Iterator[tuple[StartedServer, LLM]]:
    """A server and an LLM over the same model with the same options. Prompts are token ids where weights are random."""
    options |= {"max_model_len": 1024, "kv_cache_memory_bytes": 2**29}
    with tempfile.TemporaryDirectory() as folder:
        if found.shape:
            options |= {"model": str(write_shape(found.shape, Path(folder))), "load_format": "dummy"}
            options["skip_tokenizer_init"] = True
        options |= {name: getattr(found, name) for name in ("quantization", "threads") if getattr(found, name)}
        command = [sys.executable, "-m", "quire.cli.main", "serve", "--port", "0", "--no-engine-spare"]
        for name, value in options.items():
            flag = "--" + name.replace("_", "-")
            if value is not False:
                command += [flag] if value is True else [flag, str(value)]
        with LLM(**options) as llm, server_process(command) as server:
            yield server, llm


def main() -> None:
    """Measure and print."""
    parser = parser_of(__doc__)
    parser.add_argument("--requests", type=int, default=40)
    parser.add_argument("--words", type=int, default=24)
    found = parser.parse_args()
    with both(found) as (server, llm):
        http_times, llm_times = compare(server, llm, found.requests, found.words)
    differences = [one - other for one, other in zip(http_times, llm_times, strict=True)]
    print(
        f"first token: {statistics.median(http_times):.2f} ms through HTTP, {statistics.median(llm_times):.2f} ms through "
        f"LLM; the difference is {statistics.median(differences):.2f} ms at the median of {len(differences)}"
    )


if __name__ == "__main__":
    main()
