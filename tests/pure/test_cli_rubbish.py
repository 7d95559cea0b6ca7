"""Flags with impossible values: each is refused by name, before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from quire.cli.main import run_command
from quire.config import EngineOptions, ServeOptions
from quire.errors import ConfigError
from quire.resolve import MOST_THREADS, check_sections


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
    ],
)
def test_numbers_of_the_server(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=name):
        ServeOptions(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "value"), [("threads", MOST_THREADS + 1), ("threads", 0), ("max_logprobs", -2)])
def test_numbers_of_the_engine(name: str, value: int) -> None:
    with pytest.raises(ConfigError, match=name):
        check_sections(EngineOptions.from_flat({name: value}))


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"a: [\n", b"- a\n", b"foo-bar: 3\n"], ids=repr)
def test_config_files(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes) -> None:
    path = tmp_path / "flags.yaml"
    path.write_bytes(content)
    try:
        status = run_command("serve", ["--config", str(path)])
    except SystemExit as end:  # a mistake in flags
        status = int(str(end.code))
    told = capsys.readouterr().err
    assert status == 2 and told.startswith("quire serve: ") and "Traceback" not in told
