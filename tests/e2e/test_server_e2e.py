"""The real server with the bundled model, as a user starts it, asked with the openai library and with curl."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import pytest

from started_server import started_server
from waiting import until

pytestmark = pytest.mark.slow

TALE = [{"role": "user", "content": "Tell me a tale."}]


@dataclass
class Served:
    """A server's process, its address, what it printed, and clients."""

    process: subprocess.Popen[str]
    url: str
    greeting: str
    client: openai.OpenAI

    def post(self, path: str, body: dict[str, Any]) -> Any:
        response = httpx.post(self.url + path, json=body, timeout=120)
        assert response.status_code == 200, response.text
        return response.json()


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with started_server("--enable-prompt-tokens-details", rows=32) as server:
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=120)
        yield Served(server.process, server.url, server.greeting, client)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0


def test_the_greeting_tells_the_phases_and_a_curl_line_that_works(served: Served) -> None:
    assert "Ready after" in served.greeting and "loading the model" in served.greeting
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    line = next(line for line in served.greeting.splitlines() if "curl" in line)
    line = line.replace('"messages"', '"max_tokens": 20, "messages"')
    answer = json.loads(subprocess.run(["sh", "-c", line + " -s"], capture_output=True, text=True, check=True).stdout)
    assert answer["choices"][0]["message"]["content"].strip()


def test_chat_streamed_and_whole_say_the_same(served: Served) -> None:
    asked: dict[str, Any] = {"model": "", "messages": TALE, "max_tokens": 40, "seed": 5, "temperature": 0.8}
    whole = served.client.chat.completions.create(**asked)
    chunks = list(served.client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content and text
    assert chunks[-1].usage is not None and whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    again = served.client.chat.completions.create(**asked)
    assert again.choices[0].message.content == text
    assert again.usage is not None and again.usage.prompt_tokens_details is not None


def test_the_answer_does_not_depend_on_who_else_asks(served: Served) -> None:
    def ask(number: int) -> str:
        answer = served.client.completions.create(
            model="", prompt=f"Once upon a time there were {number} brothers", max_tokens=24, seed=number
        )
        return answer.choices[0].text

    alone = [ask(number) for number in range(6)]
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(ask, [number % 6 for number in range(24)]))
    assert together == [alone[number % 6] for number in range(24)]


def test_log_probabilities_agree_with_each_other(served: Served) -> None:
    prompt = "Once upon a time there was a king"
    given: dict[str, Any] = {"prompt": prompt, "max_tokens": 6, "temperature": 0, "logprobs": 3}
    choice = served.post("/v1/completions", given)["choices"][0]
    shown = choice["logprobs"]
    assert "".join(shown["tokens"]) == choice["text"]
    for token, top in zip(shown["tokens"], shown["top_logprobs"], strict=True):
        assert len(top) in (3, 4) and max(top.values()) == top[token]
    assert shown["text_offset"] == [len("".join(shown["tokens"][:index])) for index in range(6)]
    # The same tokens as a prompt must be given the same probabilities.
    echoed = served.post(
        "/v1/completions", {"prompt": prompt + choice["text"], "max_tokens": 0, "echo": True, "logprobs": 3}
    )["choices"][0]["logprobs"]
    assert echoed["token_logprobs"][0] is None
    if echoed["tokens"][-6:] == shown["tokens"]:
        assert echoed["token_logprobs"][-6:] == pytest.approx(shown["token_logprobs"], abs=0.05)
    chat = served.post(
        "/v1/chat/completions", {"messages": TALE, "max_tokens": 3, "logprobs": True, "top_logprobs": 2}
    )["choices"][0]["logprobs"]["content"]
    assert [len(item["top_logprobs"]) for item in chat] == [2, 2, 2]


def test_sampling_fields_have_their_effect(served: Served) -> None:
    tokens = served.post("/tokenize", {"prompt": " the", "add_special_tokens": False})["tokens"]
    body = {"prompt": "Once upon a time", "max_tokens": 12, "temperature": 0}
    only = served.post("/v1/completions", body | {"allowed_token_ids": tokens})["choices"][0]["text"]
    assert only == " the" * 12
    biased = served.post("/v1/completions", body | {"logit_bias": {str(tokens[0]): 100}})["choices"][0]["text"]
    assert biased == " the" * 12
    plain = served.post("/v1/completions", body)["choices"][0]["text"]
    word = plain.split()[0]
    banned = served.post("/v1/completions", body | {"bad_words": [word]})["choices"][0]["text"]
    assert word not in banned.split()
    several = served.post("/v1/completions", body | {"temperature": 1.0, "n": 4, "seed": 1})["choices"]
    assert len({choice["text"] for choice in several}) > 1
    stopped = served.post("/v1/completions", body | {"stop": [plain[5:8]]})["choices"][0]
    assert stopped["text"] == plain[: plain.index(plain[5:8])] and stopped["finish_reason"] == "stop"


def test_wrong_requests_leave_the_server_up(served: Served) -> None:
    for body in (
        {"prompt": ""},
        {"prompt": [10**9]},
        {"prompt": [0] * 100_000},
        {"prompt": "x", "temperature": -1},
        {"prompt": "x", "top_k": 2**31 - 1, "max_tokens": 1},
        {"prompt": "x", "seed": -(2**63), "max_tokens": 1},
        {"prompt": "x", "logit_bias": {"0": -1e308}, "max_tokens": 1},
        {"prompt": "x", "repetition_penalty": 1e308, "max_tokens": 1},
        {"prompt": "x", "repetition_penalty": 1e-308, "max_tokens": 1},
        {"prompt": "x", "min_p": 1.0, "top_p": 1e-300, "max_tokens": 1},
        {"prompt": "x", "n": 100, "max_tokens": 1},
        {"prompt": "\ud800", "max_tokens": 1},
        {"prompt": "x", "stop": ["\ud800"], "max_tokens": 1},
    ):
        content = json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        response = httpx.post(served.url + "/v1/completions", content=content, headers=headers, timeout=120)
        assert response.status_code in (200, 400), (body, response.text)
        assert httpx.get(served.url + "/health", timeout=60).status_code == 200


def test_clients_that_leave_free_the_engine(served: Served) -> None:
    for _ in range(10):
        stream = served.client.completions.create(model="", prompt="Once", max_tokens=1500, stream=True)
        next(iter(stream))
        stream.close()
    wanted = (r'finished_reason="abort".*\} 10\.0', r"num_requests_running\{.*\} 0\.0", r"usage_perc\{.*\} 0\.0")

    def is_free() -> bool:
        figures = httpx.get(served.url + "/metrics", timeout=60).text
        return all(re.search(f"quire:.*{each}", figures) for each in wanted)

    until(is_free)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("/no/such/model",), "/no/such/model"),
        (("--host", "0.0.0.0", "--port", "0"), "--api-key"),
        (("--prot", "8000"), "--port"),
        (("--max-model-len", "10000000", "--port", "0"), "max_model_len"),
    ],
)
def test_a_start_that_cannot_work_says_why(arguments: tuple[str, ...], said: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "quire.cli.main", "serve", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"},
    )
    out, err = process.communicate(timeout=120)
    assert process.returncode not in (0, None)
    assert said in out + err and "Traceback" not in out + err
