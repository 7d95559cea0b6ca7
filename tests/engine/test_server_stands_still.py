"""An API process that stands still is followed by another one; the server goes on meanwhile and after."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import httpx
import psutil

from waiting import until

sys.path.insert(0, str(Path(__file__).parent.parent))

from started_server import server_process

SERVER = Path(__file__).parent / "mixer_server.py"
SILENCE = 8  # seconds


def is_api_process(process: psutil.Process) -> bool:
    try:
        return "quire.serve.api_process" in process.cmdline()
    except psutil.NoSuchProcess:  # it has just ended
        return False


def test_an_api_process_that_stands_still_is_followed_by_another_one() -> None:
    command = [sys.executable, str(SERVER), "--port", "0", "--api-server-count", "2", "--no-engine-spare"]
    with server_process([*command, "--engine-timeout", str(SILENCE)], PYTHONHASHSEED="0") as server:

        def api_processes() -> list[psutil.Process]:
            return [child for child in psutil.Process(server.process.pid).children() if is_api_process(child)]

        before = api_processes()
        os.kill(before[0].pid, signal.SIGSTOP)
        until(lambda: not before[0].is_running())
        until(lambda: len(api_processes()) == 2)
        body = {"prompt": [30, 31], "max_tokens": 5, "ignore_eos": True}
        for _ in range(8):  # to either of them
            assert httpx.post(server.url + "/v1/completions", json=body, timeout=60).status_code == 200
