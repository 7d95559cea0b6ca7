"""`quire serve` as a process of its own: started, hurt and ended by tests of every suite."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass
class StartedServer:
    """A server that takes requests: its process, its address, and what it printed until then."""

    process: subprocess.Popen[str]
    url: str
    greeting: str


@contextmanager
def started_server(*arguments: str, rows: int, cache_mib: int = 64, threads: int = 2) -> Iterator[StartedServer]:
    """A server with these further arguments while the block runs. Its log goes where the test's own goes."""
    process = subprocess.Popen(
        [sys.executable, "-m", "quire.cli.main", "serve", "--port", "0", "--max-num-seqs", str(rows), *arguments]
        + ["--kv-cache-memory-bytes", str(cache_mib * 2**20)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"},
    )
    try:
        assert process.stdout is not None
        greeting = ""
        for line in process.stdout:
            greeting += line
            if "curl" in line:
                break
        found = re.search(r"http://127\.0\.0\.1:\d+", greeting)
        assert found, f"the server did not start: {greeting}"
        yield StartedServer(process, found[0], greeting)
    finally:
        process.kill()
        process.communicate()


def engine_pid(server_pid: int) -> int | None:
    """The engine process of a server, if it has one now. The spare one is always younger."""
    found = []
    for path in Path(f"/proc/{server_pid}/task").glob("*/children"):
        for child in path.read_text().split():
            try:
                if b"quire.engine.processes" in Path(f"/proc/{child}/cmdline").read_bytes():
                    found.append(
                        (int(Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[19]), int(child))
                    )
            except OSError:
                continue
    return min(found)[1] if found else None
