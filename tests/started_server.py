"""`quire serve` as a process of its own: started, hurt and ended by tests of every suite."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))

from server_process import StartedServer, server_process


@contextmanager
def started_server(*arguments: str, rows: int, cache_mib: int = 64, threads: int = 2) -> Iterator[StartedServer]:
    """A server with these further arguments while the block runs. Its log goes where the test's own goes."""
    command = [sys.executable, "-m", "quire.cli.main", "serve", "--port", "0", "--max-num-seqs", str(rows), *arguments]
    command += ["--kv-cache-memory-bytes", str(cache_mib * 2**20)]
    with server_process(command, OMP_NUM_THREADS=str(threads)) as server:
        yield server


def engine_pid(server_pid: int) -> int | None:
    """The engine process of a server, if it has one now. The spare one is always younger."""
    found = []
    for path in Path(f"/proc/{server_pid}/task").glob("*/children"):
        for child in path.read_text().split():
            try:
                if b"quire.engine.engine_process" in Path(f"/proc/{child}/cmdline").read_bytes():
                    found.append(
                        (int(Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[19]), int(child))
                    )
            except OSError:
                continue
    return min(found)[1] if found else None


def kill_engine(server_pid: int) -> None:
    """Kill the engine process of a server, which must have one."""
    victim = engine_pid(server_pid)
    assert victim is not None, "the server has no engine process to kill"
    os.kill(victim, signal.SIGKILL)
