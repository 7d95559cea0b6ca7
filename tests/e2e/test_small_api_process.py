"""The API process stays small: for a model that quire reads itself it loads neither torch nor transformers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from started_server import started_server

HEAVY = ("torch", "transformers", "huggingface_hub", "safetensors", "sympy")
MOST = 160 << 20  # bytes; torch alone takes as much again
BUNDLED = Path(__file__).parent.parent.parent / "src" / "quire" / "bundled" / "model"


def test_what_the_server_imports_brings_nothing_heavy() -> None:
    code = (
        "import sys, quire.serve.app, quire.serve.run, quire.engine.async_engine, quire.engine.supervised; "
        "from quire.text import load_tokenizer; "
        f"load_tokenizer({str(BUNDLED)!r}).encode('Once upon a time'); "
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_process_of_a_server_that_has_answered() -> None:
    with started_server(rows=2, threads=1) as server:
        body = {"messages": [{"role": "user", "content": "Tell me a tale."}], "max_tokens": 2}
        assert httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=120).status_code == 200
        maps = Path(f"/proc/{server.process.pid}/maps").read_text()
        assert "libtorch" not in maps and "tokenizers" in maps
        status = Path(f"/proc/{server.process.pid}/status").read_text()
        resident = next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmRSS"))
        assert resident < MOST, f"{resident >> 20} MiB"
