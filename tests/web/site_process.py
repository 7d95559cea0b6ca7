"""A real server on the bundled model, as a process that can be hurt. Used by the page's tests."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil


@dataclass
class Site:
    """A server's address and its process."""

    url: str
    process: subprocess.Popen[str]

    def kill_engine(self) -> None:
        """kill -9 for the process that holds the model."""
        children = psutil.Process(self.process.pid).children()
        engines = [child for child in children if "quire.engine.processes" in " ".join(child.cmdline())]
        max(engines, key=lambda child: child.memory_info().rss).kill()


@contextmanager
def serving(*arguments: str) -> Iterator[Site]:
    command = [sys.executable, "-m", "quire.cli.main", "serve", "--port", "0", "--max-num-seqs", "4"]
    process = subprocess.Popen(
        [*command, "--kv-cache-memory-bytes", str(16 * 2**20), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    try:
        assert process.stdout is not None
        found = None
        for line in process.stdout:
            found = found or re.search(r"http://127\.0\.0\.1:\d+", line)
            if "curl" in line:
                break
        assert found, "the server did not start"
        yield Site(found[0], process)
    finally:
        process.kill()
        process.communicate()
