"""A server in bad surroundings: no home, no place for any file, streams that take nothing, a poor locale. And its end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from waiting import until

pytestmark = pytest.mark.slow

CHAT = {"messages": [{"role": "user", "content": "Tell me a tale."}], "max_tokens": 4}
SLOW = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


def descendants(pid: int) -> list[int]:
    """All processes below this one."""
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, path.read_text().split()):
            found += [child, *descendants(child)]
    return found


def is_there(pid: int) -> bool:
    """Whether the process lives; one that waits for its parent to hear of its end does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.parametrize("api_processes", [1, 2])
def test_a_server_needs_little_and_leaves_nothing(tmp_path: Path, api_processes: int) -> None:
    command = [
        sys.executable,
        "-m",
        "quire.cli.main",
        "serve",
        "--uds",
        str(tmp_path / "socket"),
        "--max-num-seqs",
        "8",
    ]
    command += ["--kv-cache-memory-bytes", str(2**25), "--trust-request-chat-template", "--template-timeout", "600"]
    command += ["--api-server-count", str(api_processes)]
    nowhere = dict.fromkeys(("HOME", "TMPDIR", "QUIRE_CACHE"), "/dev/null/nowhere")  # not even for root
    full = Path("/dev/full").open("w")  # noqa: SIM115
    server = subprocess.Popen(command, stdout=full, stderr=full, env={**os.environ, **nowhere, "LC_ALL": "C"})
    transport = httpx.HTTPTransport(uds=str(tmp_path / "socket"))
    try:
        with full, httpx.Client(base_url="http://quire", transport=transport, timeout=60) as client:

            def answers(path: str, body: dict[str, Any] | None = None) -> bool:
                try:
                    return (client.get(path) if body is None else client.post(path, json=body)).is_success
                except httpx.TransportError:
                    assert server.poll() is None, "the server has ended"
                    return False

            until(lambda: answers("/readyz"))
            until(lambda: answers("/v1/chat/completions", CHAT))
            if api_processes == 1:
                server.send_signal(signal.SIGTERM)
                assert server.wait(60) == 0
                return
            with pytest.raises(httpx.ReadTimeout):  # a template goes on for ever in a process of its own
                client.post("/v1/chat/completions", json=CHAT | {"chat_template": SLOW}, timeout=2)
            left = descendants(server.pid)
            assert len(left) >= 4, "an engine, two API processes, one that renders"
            server.kill()
            until(lambda: not any(map(is_there, left)))
    finally:
        server.kill()
        server.wait()
