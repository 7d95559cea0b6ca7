"""The real server over the engine of fake_engine.py: python bench/fake_server.py RATE ROWS [flags of quire serve].

Starts it, waits until it listens and says where; used by the benches and the soak tests of the server.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from quire import env
from quire.cli.options import engine_options, engine_parser, section_of
from quire.config import ServeOptions
from quire.engine.child import ChildProcess
from quire.serve.run import run_server

HERE = Path(__file__).parent


@dataclass
class Started:
    """A server that listens."""

    process: subprocess.Popen[str]
    host: str
    port: int  # 0 when it listens on a Unix socket

    @property
    def pid(self) -> int:
        """Of the API process."""
        return self.process.pid


@contextmanager
def server_process(command: list[str]) -> Iterator[Started]:
    """Run a command that serves until the block ends; it must print its address in a line with `curl`."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    try:
        assert process.stdout is not None
        greeting = ""
        for line in process.stdout:
            greeting += line
            if "curl" in line:
                break
        found = re.search(r"http://([\d.]+):(\d+)", greeting)
        if not found and "--unix-socket" not in greeting:
            raise SystemExit(f"the server did not start: {greeting}")
        yield Started(process, found[1] if found else "", int(found[2]) if found else 0)
    finally:
        process.kill()
        process.communicate()


@contextmanager
def fake_server(rate: float, rows: int, *flags: str) -> Iterator[Started]:
    """This program in a process of its own."""
    with server_process([sys.executable, __file__, str(rate), str(rows), "--port", "0", *flags]) as started:
        yield started


def main() -> int:
    """Serve."""
    rate, rows, *flags = sys.argv[1:]
    command = (sys.executable, str(HERE / "fake_engine.py"), rate, rows)
    parser = engine_parser("fake_server", "The server over a clock.")
    parser.add_section(ServeOptions, "server")
    found = parser.parse(flags)
    env.set_up_logging()
    options = section_of(ServeOptions, found)
    return run_server(engine_options(found), options, new_process=partial(ChildProcess, command))


if __name__ == "__main__":
    sys.exit(main())
