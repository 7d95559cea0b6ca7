"""The environment: few variables, read when asked for."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from quire import env
from quire.errors import ConfigError


def test_keys_come_from_either_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QUIRE_API_KEY", raising=False)
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    assert env.api_keys() == ()
    monkeypatch.setenv("VLLM_API_KEY", "old")
    assert env.api_keys() == ("old",)
    monkeypatch.setenv("QUIRE_API_KEY", "a, b,")
    assert env.api_keys() == ("a", "b")


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("QUIRE_CACHE", raising=False)
    assert env.cache_folder() == Path.home() / ".cache" / "quire"
    monkeypatch.setenv("QUIRE_CACHE", str(tmp_path))
    assert env.cache_folder() == tmp_path


def test_log_level(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUIRE_LOG_LEVEL", "DEBUG")
    assert env.log_level() == "debug"
    monkeypatch.setenv("QUIRE_LOG_LEVEL", "loud")
    with pytest.raises(ConfigError, match="loud.*debug, info, warning, error"):
        env.log_level()


def test_cpu_level_is_off_when_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUIRE_CPU_LEVEL", "")
    assert env.cpu_level() is None


def test_logging_is_set_up_once() -> None:
    logger = logging.getLogger("quire")
    before = list(logger.handlers), logger.level, logger.propagate
    try:
        env.set_up_logging("warning")
        env.set_up_logging("error")
        assert len(logger.handlers) == max(1, len(before[0]))
        assert logger.level == logging.ERROR
    finally:
        logger.handlers, logger.propagate = before[0], before[2]
        logger.setLevel(before[1])
