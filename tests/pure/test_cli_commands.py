"""The command line around the engine: dispatch, sessions over HTTP, conversations, workloads, rooflines."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from quire import roofline
from quire.cli import chat
from quire.cli.main import COMMANDS, main
from quire.cli.options import SampleOptions, split_model
from quire.cli.session import Figures, RemoteSession
from quire.cli.workloads import WorkloadOptions, make_items
from quire.errors import ConfigError, QuireError


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in COMMANDS)


def test_help_of_bench_lists_what_can_be_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"quire bench {name}" in text for name in ("latency", "throughput", "serve"))


def test_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["srve"]) == 2
    assert "Did you mean 'serve'?" in capsys.readouterr().err


def test_a_mistake_ends_with_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "speed"]) == 2
    assert "quire bench latency" in capsys.readouterr().err


def test_model_and_prompt() -> None:
    assert split_model(["hello"]) == (None, "hello")
    assert split_model(["m", "hello"]) == ("m", "hello")
    with pytest.raises(ConfigError, match="in quotes"):
        split_model(["m", "hello", "world"])
    with pytest.raises(ConfigError, match="looks like a model, and there is no prompt"):
        split_model(["Qwen/Qwen3-0.6B"])
    assert split_model(["either/or? " * 1000])[0] is None


class Recorder(BaseHTTPRequestHandler):
    """A server that answers every prompt with the same two pieces and keeps what it was asked."""

    asked: list[dict] = []

    def do_GET(self) -> None:
        models = [] if "/none" in self.path else [{"id": "first"}, {"id": "second"}]
        self._send(200, "application/json", json.dumps({"data": models}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body | {"path": self.path, "key": self.headers.get("Authorization")})
        if body.get("temperature") == 2.0:
            self._send(400, "application/json", json.dumps({"error": {"message": "too hot"}}))
            return
        pieces = [{"text": "Hel"}, {"text": "lo"}]
        if "messages" in body:
            pieces = [
                {"delta": {"role": "assistant", "content": ""}},
                *({"delta": {"content": p}} for p in ("Hel", "lo")),
            ]
        events: list[dict] = [{"choices": [piece]} for piece in pieces]
        if "top_k" not in body:  # the sign of a test whose server shall break off
            events.append({"choices": [{"finish_reason": "stop"}]})
        events.append({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}})
        text = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
        self._send(200, "text/event-stream", text + "data: [DONE]\n\n")

    def _send(self, status: int, kind: str, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    Recorder.asked = []
    listening = HTTPServer(("127.0.0.1", 0), Recorder)
    thread = threading.Thread(target=listening.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listening.server_port}/v1"
    listening.shutdown()
    thread.join()
    listening.server_close()


def test_remote_completion(server: str) -> None:
    session = RemoteSession(server, None, "secret", SampleOptions(temperature=0.5))
    assert "".join(session.complete("Hi")) == "Hello"
    assert session.figures.prompt_tokens == 3
    assert session.figures.output_tokens == 2
    asked = Recorder.asked[-1]
    assert (asked["path"], asked["model"], asked["prompt"]) == ("/v1/completions", "first", "Hi")
    assert (asked["temperature"], asked["key"], asked["stream"]) == (0.5, "Bearer secret", True)


def test_remote_error_is_one_sentence(server: str) -> None:
    session = RemoteSession(server, "second", None, SampleOptions(temperature=2.0))
    with pytest.raises(QuireError, match="answered 400: too hot"):
        list(session.complete("Hi"))


def test_a_stream_that_breaks_off_is_an_error(server: str) -> None:
    stream = RemoteSession(server, None, None, SampleOptions(top_k=1)).complete("Hi")
    assert [next(stream), next(stream)] == ["Hel", "lo"]
    with pytest.raises(QuireError, match="ended before the answer did"):
        next(stream)


def test_a_server_without_models(server: str) -> None:
    with pytest.raises(QuireError, match="--model-name"):
        RemoteSession(server + "/none", None, None, SampleOptions())


def test_no_server() -> None:
    with pytest.raises(QuireError, match="No server answers.*quire serve"):
        RemoteSession("http://127.0.0.1:9/v1", None, None, SampleOptions())
    with pytest.raises(ConfigError, match="localhost:8000"):
        RemoteSession("localhost:8000", None, None, SampleOptions())


def test_chat_keeps_the_conversation(server: str, capsys: pytest.CaptureFixture[str]) -> None:
    session = RemoteSession(server, None, None, SampleOptions())
    conversation = chat.Dialogue(session, "Be brief.", stats=True)
    conversation.say("One")
    conversation.say("Two")
    assert [message["content"] for message in Recorder.asked[-1]["messages"]] == ["Be brief.", "One", "Hello", "Two"]
    captured = capsys.readouterr()
    assert captured.out == "Hello\nHello\n"
    assert "3 tokens in, 2 out" in captured.err


def test_chat_commands(server: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    lines = iter(["One", "/system Rhyme.", "Two", "/nothing", "/reset", "", "Three", "/quit", "never"])
    monkeypatch.setattr(chat, "ask", lambda mark: next(lines, None))
    chat.talk(chat.Dialogue(RemoteSession(server, None, None, SampleOptions()), None, stats=False))
    sent = [[message["content"] for message in asked["messages"]] for asked in Recorder.asked]
    assert sent == [["One"], ["Rhyme.", "Two"], ["Rhyme.", "Three"]]
    assert "/reset" in capsys.readouterr().out


@pytest.mark.parametrize("person", [True, False])
def test_what_fails_in_a_conversation(
    server: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], person: bool
) -> None:
    lines = iter(["One", "Two"])
    monkeypatch.setattr(chat, "ask", lambda mark: next(lines, None))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: person, raising=False)
    dialogue = chat.Dialogue(RemoteSession(server, None, None, SampleOptions(temperature=2.0)), None, stats=False)
    with contextlib.nullcontext() if person else pytest.raises(QuireError, match="too hot"):
        chat.talk(dialogue)
    assert capsys.readouterr().err.count("too hot") == (2 if person else 0)
    assert len(Recorder.asked) == (2 if person else 1) and dialogue.messages == []


def test_chat_through_main(server: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "--url", server, "-q", "Hi", "--max-tokens", "5"]) == 0
    assert capsys.readouterr().out == "Hello\n"
    assert Recorder.asked[-1]["max_tokens"] == 5
    assert main(["complete", "second", "--url", server, "-q", "Hi"]) == 0
    assert Recorder.asked[-1]["model"] == "second"
    assert main(["complete", "--url", server + "/nowhere", "-q", "Hi", "--temperature", "2"]) == 1


def test_figures() -> None:
    line = Figures(prompt_tokens=5, output_tokens=11, first_seconds=0.5, seconds=1.5).line()
    assert line == "[5 tokens in, 11 out, first after 0.50 s, then 11.0 tokens/s]"


def test_random_workload_is_the_same_for_a_seed() -> None:
    options = WorkloadOptions(num_prompts=5, input_len=20, output_len=8, random_range_ratio=0.5, random_prefix_len=4)
    one, two = (make_items(options, 1000, list, seed) for seed in (1, 1))
    assert one == two
    assert make_items(options, 1000, list, 2) != one
    assert len({tuple(item.prompt_token_ids[:4]) for item in one}) == 1
    assert all(14 <= len(item.prompt_token_ids) <= 34 and 4 <= item.output_len <= 12 for item in one)
    assert all(0 <= token < 1000 for item in one for token in item.prompt_token_ids)


def test_workloads_from_files(tmp_path: Path) -> None:
    shared = tmp_path / "shared.json"
    turns = [{"value": "a question"}, {"value": "an answer"}]
    shared.write_text(json.dumps([{"conversations": turns}, {"conversations": turns[:1]}]))
    options = WorkloadOptions(dataset_name="sharegpt", dataset_path=str(shared))
    items = make_items(options, 100, lambda text: list(range(len(text))), 0)
    assert [(len(item.prompt_token_ids), item.output_len) for item in items] == [(10, 9)]
    own = tmp_path / "own.jsonl"
    own.write_text('{"prompt": "abc"}\n\n{"prompt": "abcd", "output": "xy"}\n')
    options = WorkloadOptions(dataset_name="custom", dataset_path=str(own), input_len=3, output_len=7)
    items = make_items(options, 100, lambda text: list(range(len(text))), 0)
    assert [(len(item.prompt_token_ids), item.output_len) for item in items] == [(3, 7), (3, 7)]


def test_workload_mistakes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--dataset-path"):
        make_items(WorkloadOptions(dataset_name="custom"), 10, list, 0)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "abc"}\n')
    with pytest.raises(ConfigError, match="must be an object with a prompt"):
        make_items(WorkloadOptions(dataset_name="custom", dataset_path=str(bad)), 10, list, 0)


def test_roofline_arithmetic() -> None:
    speed = roofline.Speed(bandwidth=100.0, flops=1000.0)
    load = roofline.Load(read_bytes=50, active_weights=25)
    assert roofline.decode_rate(load, speed, 1, 0) == pytest.approx(2.0)  # half a second to read
    assert roofline.decode_rate(load, speed, 1, 50) == pytest.approx(1.0)  # and as much for the pages
    assert roofline.decode_rate(load, speed, 100, 0) == pytest.approx(20.0)  # arithmetic binds
    assert roofline.prefill_rate(load, speed) == pytest.approx(20.0)


def test_roofline_measures_something() -> None:
    for speed in (roofline.measure_cpu(1), roofline.measure_numpy(1)):
        assert 1e8 < speed.bandwidth < 1e13
        assert 1e8 < speed.flops < 1e15
