"""What an engine is to the comparison, and a runner process that is asked line by line.

A session holds one loaded model of one engine; the workloads of a group are asked of it in turn.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import selectors
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from bench.cpu import quiet
from bench.cpu.place import Place
from bench.cpu.workloads import Workload

CLOSING = 30.0  # seconds that an engine gets to end by itself
REASON = re.compile(r"^(.*?\) )?(ERROR .*?\] )?(?P<text>[\w.]*(Error|Exception|error|failed)\b.*)$")


class EngineFailed(Exception):
    """An engine could not do what was asked; the message is the reason, for the table."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What an engine reached, in the workload's unit: the median, and each single run."""

    value: float
    samples: tuple[float, ...]
    peak: int  # bytes of memory
    details: dict[str, Any] = field(default_factory=dict)


class Session(Protocol):
    """A loaded engine."""

    def prepare(self) -> None:
        """Load; not part of any measurement. Raises EngineFailed."""

    def run(self, workload: Workload) -> Answer:
        """Do the work. Raises EngineFailed."""

    def hold(self) -> None:
        """Let no process of the engine run until `release`: some spin while they wait."""

    def release(self) -> None:
        """Let them run again."""

    def close(self) -> None:
        """End all processes; never raises."""


@dataclass(frozen=True, slots=True)
class Engine:
    """One of the engines: why it cannot run here (None: it can), and how to open a session of it."""

    name: str
    missing: Callable[[Place], str | None]
    open: Callable[[Place, Workload, str], Session]


def last_reason(log: Path) -> str:
    """The line of a log that says best why its process failed."""
    try:
        lines = log.read_text(errors="replace").splitlines()
    except OSError:
        return "no log"
    found = [match["text"] for line in lines if (match := REASON.match(line.strip()))]
    # An engine's own processes fail first and say why; those that wait for them only say that they failed.
    causes = [text for text in found if "see stack trace" not in text.lower() and "EngineDead" not in text]
    text = (causes or found or [line for line in lines if line.strip()] or ["nothing was logged"])[-1]
    return text.strip()[:200]


class LineSession:
    """A runner in a process of its own: one JSON line in, one JSON line out. What it prints else goes to a log."""

    def __init__(self, command: list[str], environment: dict[str, str], log: Path, place: Place) -> None:
        self.command = command
        self.environment = environment
        self.log = log
        self.place = place
        self.process: subprocess.Popen[bytes] | None = None

    def prepare(self) -> None:
        """Start the runner and wait until it has loaded the model."""
        self.start()
        self.read(self.place.load_limit, "loading")

    def start(self) -> None:
        """Start the process without waiting for it."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as errors:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=os.environ | self.environment,
                start_new_session=True,
            )

    def run(self, workload: Workload) -> Answer:
        """Ask for one workload."""
        if self.process is None:
            self.prepare()
        self.send(workload)
        found = self.read(self.place.limit, workload.title)
        assert self.process is not None
        peak = quiet.peak_memory(self.process.pid)
        value = peak / 1e9 if workload.kind == "memory" else found["value"]
        return Answer(value, tuple(found["samples"]), peak, found.get("details", {}))

    def send(self, workload: Workload) -> None:
        """Write the workload to the runner."""
        assert self.process is not None and self.process.stdin is not None
        names = ("kind", "requests", "input_len", "output_len", "shared_len", "repeats")
        line = json.dumps({name: getattr(workload, name) for name in names})
        try:
            self.process.stdin.write(line.encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise EngineFailed(last_reason(self.log)) from None

    def read(self, limit: float, doing: str) -> dict[str, Any]:
        """The next line of the runner, within `limit` seconds."""
        assert self.process is not None and self.process.stdout is not None
        stream = self.process.stdout
        with selectors.DefaultSelector() as selector:
            selector.register(stream, selectors.EVENT_READ)
            if not selector.select(limit):
                self.kill()
                raise EngineFailed(f"{doing}: no answer within {limit:.0f} s")
        line = stream.readline()  # the runner writes whole lines at once
        if not line:
            raise EngineFailed(last_reason(self.log))
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            cause = last_reason(self.log) if "EngineDead" in found["error"] else found["error"]
            raise EngineFailed(cause)
        return found

    def hold(self) -> None:
        self.tell(signal.SIGSTOP)

    def release(self) -> None:
        self.tell(signal.SIGCONT)

    def kill(self) -> None:
        """End the runner and all its processes at once."""
        self.tell(signal.SIGKILL)

    def tell(self, number: signal.Signals) -> None:
        """Send a signal to the runner and to all that descends from it."""
        if self.process is not None:
            for member in quiet.family(quiet.processes(), self.process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(member.pid, number)

    def close(self) -> None:
        """Close the runner's input, which ends it; kill what has not ended after a while."""
        if self.process is None:
            return
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(CLOSING)
        except subprocess.TimeoutExpired:
            self.kill()
            self.process.wait()
        self.process.stdout.close()
        self.process = None


STILL = 3.0  # seconds without a change after which a folder is taken for finished


class StartSession(LineSession):
    """Measures the start itself, from outside: every run is a new process. A first start finds an empty `cache` folder."""

    def __init__(
        self, command: list[str], environment: dict[str, str], log: Path, place: Place, cache: Path | None = None
    ) -> None:
        super().__init__(command, environment, log, place)
        self.cache = cache

    def prepare(self) -> None:
        """Nothing: what others do before they are asked is what is measured here."""

    def run(self, workload: Workload) -> Answer:
        """Seconds from the start of the process to its first token. A restart follows a start that is not counted."""
        self.close()
        if self.cache is not None:
            shutil.rmtree(self.cache, ignore_errors=True)
        seconds = 0.0
        for again in range(2 if workload.kind == "restart" else 1):
            if again:
                self.settle()
            self.close()
            began = time.monotonic()
            self.start()
            self.send(workload)
            self.read(self.place.load_limit, "loading")
            self.read(self.place.limit, "the first token")
            seconds = time.monotonic() - began
        assert self.process is not None
        return Answer(seconds, (seconds,), quiet.peak_memory(self.process.pid))

    def settle(self) -> None:
        """Wait until the first start has left on disk what it wants to: engines write it while they already answer."""
        deadline = time.monotonic() + self.place.limit
        seen, since = -1, time.monotonic()
        while self.cache is not None and time.monotonic() < deadline:
            now = sum(path.stat().st_size for path in self.cache.rglob("*") if path.is_file())
            if now != seen:
                seen, since = now, time.monotonic()
            elif time.monotonic() - since > STILL:
                return
            time.sleep(0.2)
