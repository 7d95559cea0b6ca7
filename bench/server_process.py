"""A server in a process of its own: started, waited for, ended. For benches and tests; knows nothing of quire's insides."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class StartedServer:
    """A server that takes requests: its process, its address, and what it printed until then."""

    process: subprocess.Popen[str]
    url: str  # empty where it listens on a Unix socket
    greeting: str

    @property
    def pid(self) -> int:
        """Of the API process."""
        return self.process.pid

    @property
    def host(self) -> str:
        """The address alone."""
        return self.url.removeprefix("http://").rpartition(":")[0]

    @property
    def port(self) -> int:
        """0 where it listens on a Unix socket."""
        return int(self.url.rpartition(":")[2] or 0)


@contextmanager
def server_process(command: list[str], **environment: str) -> Iterator[StartedServer]:
    """Run a command that serves until the block ends; it must print its address in a line with `curl`.

    Its log goes where the caller's own goes. `environment`: variables besides those of this process.
    """
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=variables)
    try:
        assert process.stdout is not None
        greeting = ""
        for line in process.stdout:
            greeting += line
            if "curl" in line:
                break
        found = re.search(r"http://[\d.]+:\d+", greeting)
        if not found and "--unix-socket" not in greeting:
            raise SystemExit(f"the server did not start: {greeting}")
        yield StartedServer(process, found[0] if found else "", greeting)
    finally:
        process.kill()
        process.communicate()
