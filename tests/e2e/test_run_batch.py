"""quire run-batch with the bundled model: killed on the way, it goes on where it was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROWS = 40


def start(folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "quire.cli.main", "run-batch", "-i", str(folder / "in"), "-o", str(folder / "out")]
    command += ["--concurrency", "4", "--kv-cache-memory-bytes", str(64 * 2**20)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"},
    )


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    tale = [{"role": "user", "content": "Tell me a tale."}]
    rows = [
        {
            "custom_id": f"row-{number}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"messages": tale, "max_tokens": 20 + number, "temperature": 0},
        }
        for number in range(ROWS)
    ]
    (tmp_path / "in").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    killed = start(tmp_path)
    try:
        while not (out.exists() and out.read_bytes().count(b"\n") >= 5):
            assert killed.poll() is None, killed.communicate()
            time.sleep(0.01)
    finally:
        killed.kill()
        killed.communicate()
    before = out.read_bytes()
    kept = before[: before.rindex(b"\n") + 1]
    done = kept.count(b"\n")
    again = start(tmp_path)
    printed, logged = again.communicate(timeout=300)
    assert again.returncode == 0, logged
    assert out.read_bytes().startswith(kept)
    assert f"{ROWS - done} rows answered" in printed and f"{done} were there already" in printed
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert sorted(answer["custom_id"] for answer in answers) == sorted(row["custom_id"] for row in rows)
    assert all(answer["response"]["status_code"] == 200 for answer in answers)
    texts = sorted((answer["response"]["body"]["choices"][0]["message"]["content"] for answer in answers), key=len)
    assert all(longer.startswith(shorter) for shorter, longer in zip(texts, texts[1:], strict=False))
