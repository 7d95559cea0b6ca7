"""Flags with impossible values: each is refused by name, before anything is loaded."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from errno import ENOSPC
from io import BytesIO, TextIOWrapper
from pathlib import Path
from types import ModuleType

import pytest

from quire.cli import main as cli
from quire.cli.main import run_command
from quire.config import MOST_THREADS, EngineOptions, ServeOptions
from quire.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("stream_interval", 0),
        ("shutdown_timeout", -1.0),
        ("engine_timeout", float("nan")),
        ("stall_timeout", -0.5),
        ("template_timeout", 0.0),
        ("max_request_bytes", 0),
        ("h11_max_header_count", 0),
        ("max_stored_responses", -1),
        ("api_server_count", 0),
        ("sse_keep_alive_interval", -1.0),
        ("shutdown_timeout", float("inf")),
        ("port", -1),
        ("otlp_traces_endpoint", "collector:4317"),
    ],
)
def test_values_of_the_server(name: str, value: float | str) -> None:
    with pytest.raises(ConfigError, match=name):
        ServeOptions(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("threads", MOST_THREADS + 1),
        ("threads", 0),
        ("max_logprobs", -2),
        ("max_num_queued_reqs", -1),
        ("max_num_queued_tokens", 0),
        ("max_num_seqs", 0),
        ("long_prefill_token_threshold", -5),
        ("packed_cache_gb", -1.0),
        ("packed_cache_gb", float("nan")),
        ("num_gpu_blocks_override", 0),
        ("gpu_memory_utilization", 1.5),
        ("max_model_len", 0),
        ("tensor_parallel_size", 2),
    ],
)
def test_numbers_of_the_engine(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=name):
        EngineOptions.from_flat({name: value})


@pytest.mark.parametrize(
    "words",
    [
        ["bench", "latency", "--num-iters", "0"],
        ["bench", "latency", "--batch-size", "0"],
        ["bench", "throughput", "--num-prompts", "-1"],
        ["bench", "throughput", "--n", "0"],
        ["bench", "serve", "--max-concurrency", "-1"],
        ["bench", "serve", "--num-prompts", "0"],
        ["run-batch", "-i", "a", "-o", "b", "--concurrency", "0"],
        ["verify", "--chunk", "0"],
    ],
    ids=" ".join,
)
def test_numbers_of_commands(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 2
    name = words[-2].removeprefix("--").replace("-", "_")
    assert f"{name} is {words[-1]}; it must be at least" in capsys.readouterr().err


def test_figures_have_a_place_before_they_are_measured(capsys: pytest.CaptureFixture[str]) -> None:
    for kind in ("latency", "throughput"):
        assert cli.main(["bench", kind, "--output-json", "/no/such/folder/figures.json"]) == 2
        assert "no folder for /no/such" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"a: [\n", b"- a\n", b"foo-bar: 3\n"], ids=repr)
def test_config_files(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes) -> None:
    path = tmp_path / "flags.yaml"
    path.write_bytes(content)
    try:
        status = run_command(["serve", "--config", str(path)])
    except SystemExit as end:  # a mistake in flags
        status = int(str(end.code))
    told = capsys.readouterr().err
    assert status == 2 and told.startswith("quire serve: ") and "Traceback" not in told


def command(monkeypatch: pytest.MonkeyPatch, action: Callable[[], None]) -> int:
    """The status of a command that does this."""
    module = ModuleType("rubbish_command")

    def main(_: Sequence[str]) -> int:
        action()
        return 0

    module.main = main  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(cli.COMMANDS, "rubbish", (module.__name__, ""))
    return cli.main(["rubbish"])


def test_letters_that_the_locale_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    written = BytesIO()
    monkeypatch.setattr(sys, "stdout", TextIOWrapper(written, encoding="ascii", write_through=True))
    assert command(monkeypatch, lambda: print("a snowman: ☃")) == 0
    assert written.getvalue() == b"a snowman: ?\n"


def test_a_full_disk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise OSError(ENOSPC, os.strerror(ENOSPC))

    assert command(monkeypatch, fail) == 1
    assert capsys.readouterr().err == f"quire rubbish: [Errno {ENOSPC}] No space left on device\n"
