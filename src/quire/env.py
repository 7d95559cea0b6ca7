"""The only reader of os.environ: few variables, each with a type, read when asked for. Also sets up logging and the
standard streams of quire's own programs.

HF_TOKEN, HF_HOME, HF_HUB_OFFLINE and their kind belong to the huggingface_hub library, which reads them itself.

    QUIRE_CPU_LEVEL   forces a lower instruction-set level of the CPU kernels
    QUIRE_CACHE       folder of what quire remembers between runs; ~/.cache/quire when not set
    QUIRE_API_KEY     key that clients must show, several separated by commas; VLLM_API_KEY works too
    QUIRE_LOG_LEVEL   debug, info, warning or error; info when not set
    QUIRE_LOG_FORMAT  text or json; text when not set
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import threading
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from quire.errors import ConfigError, reason

LOG_LEVELS = ("debug", "info", "warning", "error")
NO_HOME = Path("/dev/null")


def cpu_level() -> str | None:
    """The instruction-set level that the CPU kernels must not exceed, or None to take the best."""
    return os.environ.get("QUIRE_CPU_LEVEL") or None


def cache_folder() -> Path:
    """Where quire keeps what it remembers between runs. Not created here."""
    return Path(os.environ.get("QUIRE_CACHE") or _home() / ".cache" / "quire")


def _home() -> Path:
    """The user's home. A user whom the system does not know, as in many containers, has one that cannot be written to."""
    try:
        return Path.home()
    except RuntimeError:
        return NO_HOME


def api_keys() -> tuple[str, ...]:
    """Keys that clients must show, from QUIRE_API_KEY or VLLM_API_KEY; empty when neither is set."""
    found = os.environ.get("QUIRE_API_KEY") or os.environ.get("VLLM_API_KEY") or ""
    return tuple(key.strip() for key in found.split(",") if key.strip())


def lower_priority() -> None:
    """Let the calling thread run only where others leave time. What the system does not allow is not done."""
    with contextlib.suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 15)


def log_level() -> str:
    """One of LOG_LEVELS. Another word raises ConfigError."""
    level = (os.environ.get("QUIRE_LOG_LEVEL") or "info").lower()
    if level not in LOG_LEVELS:
        raise ConfigError(f"QUIRE_LOG_LEVEL is {level!r}; it can be {', '.join(LOG_LEVELS)}.")
    return level


def open_closed_streams() -> None:
    """Put /dev/null in place of standard streams that are closed, here and in the processes that are started from here:
    else the first sockets get their numbers, and what somebody prints goes there."""
    while (found := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(found, True)
    os.close(found)


def drop_full_streams() -> None:
    """Write out what was printed. A stream that takes no more, its reader gone or its disk full, becomes /dev/null: else
    the interpreter tries again at its end, and ends with status 120."""
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), number)


def announce(lines: Sequence[str]) -> None:
    """Print what people may want to know. That nobody reads it, or that the disk is full, must not end what works."""
    try:
        print("\n".join(lines), flush=True)
    except OSError as error:
        drop_full_streams()
        logging.getLogger("quire").warning("%s (stdout takes nothing: %s)", lines[0], reason(error))


def set_up_logging(level: str | None = None) -> None:
    """Write quire's log to stderr, in the program's own processes; a program that imports quire keeps its logging."""
    logger = logging.getLogger("quire")
    logger.setLevel((level or log_level()).upper())
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(
            JsonLines()
            if os.environ.get("QUIRE_LOG_FORMAT") == "json"
            else logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S")
        )
        logger.addHandler(handler)
        logger.propagate = False


def log_as_json() -> None:
    """Write quire's log as JSON from now on, in this process and in those that it starts."""
    os.environ["QUIRE_LOG_FORMAT"] = "json"
    for handler in logging.getLogger("quire").handlers:
        handler.setFormatter(JsonLines())


class JsonLines(logging.Formatter):
    """One object a line: time, level, logger, process, message; `request` where a record carries one, `error` likewise."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line."""
        content = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "process": record.process,
            "message": record.getMessage(),
        }
        request = getattr(record, "request", None)
        if request is not None:
            content["request"] = request
        if record.exc_info:
            content["error"] = self.formatException(record.exc_info)
        return json.dumps(content, ensure_ascii=False, default=str)
