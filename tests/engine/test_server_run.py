"""The life of the server's process: it greets, drains on SIGTERM, ends with the right status, takes its address early."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import httpx
import pytest
from served import MAX_MODEL_LEN, Setup, engine_of, parrot

from quire.config import EngineOptions, ServeOptions
from quire.engine.async_engine import AsyncEngine
from quire.engine.executor import FakeExecutor
from quire.errors import ConfigError
from quire.serve.listen import bind
from quire.serve.progress import Progress
from quire.serve.run import run_server
from quire.serve.service import ModelCard, Service
from quire.serve.serving import Entrance, Launch, serve
from quire.serve.startup import StartReport
from waiting import until

HERE = Path(__file__).parent


@contextmanager
def process(shutdown_timeout: float, delay: float) -> Iterator[tuple[subprocess.Popen[str], str, list[str]]]:
    """The server's process, its address, and the lines of its greeting."""
    command = [sys.executable, str(HERE / "serve_parrot.py"), str(shutdown_timeout), str(delay)]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=HERE)
    try:
        assert started.stdout is not None
        lines = [started.stdout.readline() for _ in range(5)]
        found = re.search(r"http://127\.0\.0\.1:\d+", lines[0])
        assert found, (lines, started.stderr and started.stderr.read())
        yield started, found[0], lines
    finally:
        started.kill()
        started.communicate()


def streamed(url: str, tokens: int) -> AbstractContextManager[httpx.Response]:
    """An answer of so many tokens as it comes."""
    body = {"prompt": "x|", "max_tokens": tokens, "stream": True}
    return httpx.stream("POST", url + "/v1/completions", json=body, timeout=60)


def heard(response: httpx.Response) -> tuple[str, str]:
    """The text of a stream that ends as it should, and why it ended."""
    *chunks, last = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert last == "[DONE]"
    choices = [json.loads(chunk)["choices"][0] for chunk in chunks]
    return "".join(choice["text"] for choice in choices), choices[-1]["finish_reason"]


def test_the_greeting_and_an_idle_end() -> None:
    with process(5, 0) as (server, url, lines):
        text = "".join(lines)
        assert "serves parrot at " + url in text and "nothing" in text and "Ready after" in text
        assert server.stdout is not None
        curl = server.stdout.readline() if not lines[-1].strip().startswith("curl") else lines[-1]
        assert curl.strip().startswith(f"curl {url}/v1/chat/completions")
        assert httpx.get(url + "/health", timeout=60).is_success
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_running_requests_finish_after_the_signal(stop: signal.Signals) -> None:
    with process(60, 0.02) as (server, url, _), streamed(url, 60) as response:
        server.send_signal(stop)
        assert heard(response) == ("abcdefghij" * 6, "length")
        assert server.wait(60) == 0


def test_late_requests_are_ended_properly_at_the_timeout() -> None:
    with process(0.3, 0.02) as (server, url, _), streamed(url, 400) as response:
        server.send_signal(signal.SIGTERM)
        assert heard(response)[1] == "abort"
        assert server.wait(60) == 0


def test_no_connection_is_taken_while_it_drains() -> None:
    def refuses() -> bool:
        try:
            httpx.get(url + "/health", timeout=60)
            return False
        except httpx.TransportError:
            return True

    with process(60, 0.02) as (server, url, _), streamed(url, 100) as response:
        server.send_signal(signal.SIGTERM)
        until(refuses)
        assert heard(response) == ("abcdefghij" * 10, "length")


def test_an_engine_that_dies_ends_the_process_with_an_error() -> None:
    """So that whoever supervises it starts it again."""
    with process(5, 0) as (server, url, _):
        assert httpx.post(url + "/v1/completions", json={"prompt": "die"}, timeout=60).status_code == 503
        assert server.wait(60) == 1


@contextmanager
def starting(awaited: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server process that starts until this file is there, and which wants a key, as soon as it answers."""
    command = [sys.executable, str(HERE / "serve_parrot.py"), "5", "0", str(awaited)]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=HERE)
    assert started.stdout is not None
    url = started.stdout.readline().strip()

    def answers() -> bool:
        assert started.poll() is None
        try:
            return httpx.get(url + "/livez", timeout=60).json().get("phase") == "pretending"
        except httpx.TransportError:
            return False

    try:
        until(answers)
        yield started, url
    finally:
        started.kill()
        started.communicate()


def test_a_server_that_starts_says_so(tmp_path: Path) -> None:
    with starting(tmp_path / "ready") as (_, url):
        live = httpx.get(url + "/livez", timeout=60).json()
        assert live["status"] == "starting" and live["phase"] == "pretending" and live["done"] == {"nothing": 0.0}
        ready = httpx.get(url + "/readyz", timeout=60)
        assert ready.status_code == 503 and ready.json()["phase"] == "pretending"
        assert (
            httpx.get(url + "/health", timeout=60).status_code
            == 503
            == httpx.get(url + "/ping", timeout=60).status_code
        )
        body = {"prompt": "say:hello;|"}
        assert httpx.post(url + "/v1/completions", json=body, timeout=60).status_code == 401
        key = {"Authorization": "Bearer secret"}
        answer = httpx.post(url + "/v1/completions", json=body, headers=key, timeout=60)
        assert answer.status_code == 503 and int(answer.headers["retry-after"]) > 0
        assert "starting: pretending" in answer.json()["error"]["message"]
        (tmp_path / "ready").touch()
        until(lambda: httpx.get(url + "/readyz", timeout=60).is_success)
        assert httpx.get(url + "/livez", timeout=60).json()["status"] == "ready"
        answer = httpx.post(url + "/v1/completions", json=body, headers=key, timeout=60)
        assert answer.json()["choices"][0]["text"] == "hello"


def test_a_start_can_be_stopped(tmp_path: Path) -> None:
    with starting(tmp_path / "never") as (server, _):
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0


def test_an_address_in_use_is_known_at_once() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match="--port"):
            run_server(EngineOptions(), ServeOptions(port=port))
    with pytest.raises(ConfigError, match="Cannot listen"):
        bind(ServeOptions(host="no.such.host.invalid", port=0, allow_insecure=True))


def test_a_public_address_without_a_key_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QUIRE_API_KEY", raising=False)
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="--allow-insecure"):
        run_server(EngineOptions(), ServeOptions(host="0.0.0.0", port=0))


def test_a_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "quire.sock"
    with bind(ServeOptions(uds=str(path))) as listener:
        listener.listen()
        with pytest.raises(ConfigError, match="Cannot listen.*--uds"):
            bind(ServeOptions(uds=str(path)))
    assert path.exists()  # left behind, as after a crash
    bind(ServeOptions(uds=str(path))).close()


def test_connections_send_without_delay() -> None:
    """Otherwise a small piece waits for the client's word about the one before it: 40 ms, in each first token."""

    async def main() -> int:
        options: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def connected(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            options.set_result(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        listener = bind(ServeOptions(port=0))
        async with await asyncio.start_server(connected, sock=listener):
            _, writer = await asyncio.open_connection(*listener.getsockname())
            found = await options
            writer.close()
        return found

    assert asyncio.run(main())


@pytest.mark.parametrize(
    ("origins", "credentials", "words"), [(("[",), False, "allowed_origins"), (("*",), True, "--allow-credentials")]
)
def test_options_that_only_the_routes_understand_end_the_server(
    origins: tuple[str, ...], credentials: bool, words: str
) -> None:
    """It must not go on saying that it is starting."""
    options = ServeOptions(port=0, allowed_origins=origins, allow_credentials=credentials)
    progress = Progress()
    running = AsyncEngine(engine_of(Setup(), FakeExecutor(parrot), progress))
    running.start()
    service = Service(running, ModelCard(("parrot",), MAX_MODEL_LEN), options, progress=progress)

    async def started() -> None:
        async with asyncio.timeout(60):
            launch = Launch(lambda: service, lambda: None, StartReport())
            await serve(Entrance(bind(options), (), options), launch)

    with pytest.raises(ConfigError, match=words):
        asyncio.run(started())
