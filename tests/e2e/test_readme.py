"""What README and documents print works: the commands exist, Python and curl lines run as they stand."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from started_server import server_process

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)


def block(language: str, containing: str) -> str:
    return next(text for kind, text in BLOCKS if kind == language and containing in text)


@pytest.fixture(scope="module")
def server() -> Iterator[int]:
    """The port of `quire serve` with the bundled model."""
    with server_process([sys.executable, "-m", "quire.cli.main", "serve", "--port", "0"]) as started:
        yield started.port
        started.process.terminate()
        assert started.process.wait(60) == 0
        assert f"at {started.url}" in started.greeting
        assert f"curl {started.url}/v1/chat/completions" in started.greeting
        assert re.search(r"loading the model +\d+\.\d+ s", started.greeting), started.greeting


def test_it_opens_with_the_two_commands() -> None:
    kind, first = BLOCKS[0]
    assert kind == "sh"
    assert [line.split("#")[0].strip() for line in first.splitlines()] == ["make serve", "make test"]
    assert README.index("```sh") < 200


def test_every_make_target_exists() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"make ([a-z-]+)", README)) - {"sure"}
    assert named <= targets, named - targets


def test_every_command_exists() -> None:
    from quire.cli.main import COMMANDS

    named = set(re.findall(r"^quire ([a-z-]+)", block("sh", "quire plan"), re.MULTILINE))
    assert named <= set(COMMANDS)


def test_files_that_are_linked_exist() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / link).is_file(), link


def test_the_python_works_as_printed() -> None:
    code = block("python", "LLM()")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "Once upon a time ... " in done.stdout
    assert "The old mill by the river ... " in done.stdout
    assert len(done.stdout.splitlines()) >= 3


@pytest.mark.parametrize("page", ["beam-search.md", "sampling.md", "structured-output.md"])
def test_the_python_of_documents_works_as_printed(page: str) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    assert "import" in code
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl here")
def test_the_curl_line_works_as_printed(server: int) -> None:
    line = block("sh", "curl").replace(":8000", f":{server}")
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["message"]["content"].strip()
    assert answer["usage"]["completion_tokens"] <= 64


def test_chat_and_complete_talk_to_the_server(server: int) -> None:
    for command in ("chat", "complete"):
        words = [sys.executable, "-m", "quire.cli.main", command, "--url", f"http://127.0.0.1:{server}/v1"]
        words += ["-q", "Once upon a time", "--max-tokens", "8", "--stats"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()
        assert " 8 out" in done.stderr
