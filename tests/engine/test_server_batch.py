"""Batch files: every row gets its answer once, whatever is wrong with others and whenever the run is interrupted."""

from __future__ import annotations

import asyncio
import json
import os
import resource
from pathlib import Path
from typing import Any

import pytest
from served import MAX_MODEL_LEN, Setup, engine_of, parrot

from quire.cli.run_batch import main
from quire.config import ServeOptions
from quire.engine.async_engine import AsyncEngine
from quire.engine.executor import FakeExecutor
from quire.errors import CapacityError, ConfigError, EngineDeadError
from quire.serve.app import create_app
from quire.serve.batch import URLS, BatchRun, done_rows, local_path, run_batch, summary
from quire.serve.progress import Progress
from quire.serve.service import ModelCard, Service

CHAT = {"messages": [{"role": "user", "content": "say:hello;"}]}


def batch(folder: Path, rows: list[Any], concurrency: int = 8, delay: float = 0.0, **settings: Any) -> BatchRun:
    """A run over these rows; the output of an earlier run stays."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "in.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    engine = engine_of(Setup(settings=settings, max_num_seqs=4), FakeExecutor(parrot, delay=delay), Progress())
    running = AsyncEngine(engine)
    running.start()
    service = Service(running, ModelCard(("parrot",), MAX_MODEL_LEN), ServeOptions())
    return BatchRun(service, create_app(service), folder / "in.jsonl", folder / "out.jsonl", concurrency)


def row(name: str, body: dict[str, Any], url: str = "/v1/chat/completions") -> dict[str, Any]:
    return {"custom_id": name, "method": "POST", "url": url, "body": body}


def answers(run: BatchRun) -> dict[str, dict[str, Any]]:
    """The output by name, or by id where there is none; each name once."""
    found = {}
    for line in run.target.read_text(encoding="utf-8").splitlines():
        answer = json.loads(line)
        assert set(answer) == {"id", "custom_id", "response", "error"}
        key = answer["custom_id"] if answer["id"].startswith("batch_req_") else answer["id"]
        assert key not in found, f"{key} is there twice"
        found[key] = answer
    return found


def test_every_route(tmp_path: Path) -> None:
    rows = [
        row("chat", CHAT | {"model": "parrot"}),
        row("completion", {"prompt": "say:yes;|", "n": 2, "temperature": 1}, "/v1/completions"),
        row("response", {"input": "say:hello;"}, "/v1/responses"),
        row("message", CHAT | {"max_tokens": 50}, "/v1/messages"),
        row("vectors", {"input": "x"}, "/v1/embeddings"),
    ]
    run = batch(tmp_path, rows)
    seconds = asyncio.run(run_batch(run))
    found = {name: answer["response"] for name, answer in answers(run).items()}
    assert found["chat"]["body"]["choices"][0]["message"]["content"] == "hello"
    assert found["chat"]["request_id"] in found["chat"]["body"]["id"]
    assert [choice["text"] for choice in found["completion"]["body"]["choices"]] == ["yes", "yes"]
    assert found["response"]["body"]["output"][0]["content"][0]["text"] == "hello"
    assert found["message"]["body"]["content"][0]["text"] == "hello"
    assert found["vectors"]["status_code"] in (200, 400, 404)
    assert [found[name]["status_code"] for name in ("chat", "completion", "response", "message")] == [200] * 4
    assert summary(run, seconds).startswith("5 rows answered")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        (7, "custom_id"),
        ({"url": URLS[0], "body": CHAT}, "custom_id"),
        ({"custom_id": "", "url": URLS[0], "body": CHAT}, "custom_id"),
        (row("same", CHAT), "same custom_id"),
        (row("x", CHAT) | {"method": "GET"}, "method"),
        (row("x", CHAT, "/metrics"), "url"),
        (row("x", CHAT, "http://127.0.0.1/v1/completions"), "url"),
        (row("x", {}) | {"body": "x"}, "body"),
        (row("x", CHAT | {"stream": True}), "streamed"),
        (row("x", {"input": "x", "background": True}, "/v1/responses"), "background"),
        (row("x", {"messages": []}), "at least one message"),
        (row("x", CHAT | {"model": "nobody"}), "does not exist"),
        (row("x", CHAT | {"temperature": 9}), "temperature"),
        (row("x", {"messages": [{"role": "user", "content": "crash;"}]}), "failed while it was running"),
    ],
)
def test_a_wrong_row_has_its_error_and_stops_nothing(tmp_path: Path, wrong: Any, words: str) -> None:
    rows = [row("same", CHAT), wrong, "", row("last", CHAT)]
    run = batch(tmp_path, rows)
    asyncio.run(run_batch(run))
    found = answers(run)
    assert len(found) == 3 and run.failed == 1
    (bad,) = (answer for name, answer in found.items() if name not in ("same", "last"))
    assert words in json.dumps(bad)
    for name in ("same", "last"):
        assert found[name]["response"]["body"]["choices"][0]["message"]["content"] == "hello"
    again = batch(tmp_path, rows)
    asyncio.run(run_batch(again))
    assert again.answered == 0 and again.skipped == 3, "errors of rows are answers, too"


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    rows = [row(f"r{number}", {"prompt": f"say:{number};|"}, "/v1/completions") for number in range(60)]

    async def interrupted() -> None:
        run = batch(tmp_path, rows, concurrency=4, delay=0.002)
        task = asyncio.create_task(run_batch(run))
        while run.answered < 20:
            await asyncio.sleep(0.002)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(interrupted())
    output = tmp_path / "out.jsonl"
    kept = output.read_bytes()
    before = kept.count(b"\n")
    assert 20 <= before < 60
    output.write_bytes(kept + b'{"id": "batch_req_1", "custom_id": "r5')  # as a crash leaves it
    run = batch(tmp_path, rows)
    asyncio.run(run_batch(run))
    assert output.read_bytes().startswith(kept)
    assert run.skipped == before and run.answered == 60 - before
    texts = {name: answer["response"]["body"]["choices"][0]["text"] for name, answer in answers(run).items()}
    assert texts == {f"r{number}": str(number) for number in range(60)}


def test_a_full_disk_loses_no_row(tmp_path: Path) -> None:
    rows = [row(f"r{number}", {"prompt": f"say:{number};|"}, "/v1/completions") for number in range(60)]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(CapacityError, match="Make room"):
            asyncio.run(run_batch(batch(tmp_path, rows, concurrency=4)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "out.jsonl").stat().st_size == 10_000
    run = batch(tmp_path, rows)
    asyncio.run(run_batch(run))
    assert len(answers(run)) == 60 and run.skipped > 10


def test_an_output_that_is_no_file(tmp_path: Path) -> None:
    """As /dev/stdout often is a pipe, which holds nothing to go on behind."""
    os.mkfifo(tmp_path / "out.jsonl")
    reader = os.open(tmp_path / "out.jsonl", os.O_RDONLY | os.O_NONBLOCK)
    asyncio.run(run_batch(batch(tmp_path, [row("only", CHAT)])))
    assert json.loads(os.read(reader, 65536))["custom_id"] == "only"
    os.close(reader)


def test_a_full_queue_is_waited_for(tmp_path: Path) -> None:
    rows = [row(f"r{number}", {"prompt": "x|", "max_tokens": 30}, "/v1/completions") for number in range(16)]
    run = batch(tmp_path, rows, concurrency=16, delay=0.001, max_num_queued_reqs=1)
    asyncio.run(run_batch(run))
    assert [answer["response"]["status_code"] for answer in answers(run).values()] == [200] * 16


def test_an_engine_that_stops_ends_the_run_and_spoils_no_row(tmp_path: Path) -> None:
    rows = [row(f"r{number}", {"prompt": "say:a;|"}, "/v1/completions") for number in range(5)]
    run = batch(tmp_path, rows)

    def gone(at_most: int) -> Any:
        raise MemoryError("gone")

    run.service.engine.engine.step = gone  # type: ignore[method-assign]
    with pytest.raises(EngineDeadError):
        asyncio.run(run_batch(run))
    assert run.target.read_bytes() == b""
    again = batch(tmp_path, rows)
    asyncio.run(run_batch(again))
    assert len(answers(again)) == 5


def test_other_files_are_not_written_to(tmp_path: Path) -> None:
    other = tmp_path / "notes.txt"
    other.write_text("dear diary\n")
    with pytest.raises(ConfigError, match="--overwrite"):
        done_rows(other)
    assert other.read_text() == "dear diary\n"


def test_cve_2026_34753_nothing_is_fetched() -> None:
    for name in ("http://127.0.0.1:1/in.jsonl", "https://x/in", "file:///etc/passwd", "s3://x"):
        with pytest.raises(ConfigError, match="local file"):
            local_path(name, "--input-file")
        with pytest.raises(ConfigError, match="local file"):
            main(["-i", name, "-o", "out.jsonl"])


def test_flags(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="-i"):
        main([])
    with pytest.raises(ConfigError, match="no file"):
        main(["-i", str(tmp_path / "none"), "-o", str(tmp_path / "out")])
    with pytest.raises(ConfigError, match="concurrency"):
        main(["-i", "a", "-o", "b", "--concurrency", "0"])


def test_bytes_that_are_no_text_spoil_their_own_rows(tmp_path: Path) -> None:
    run = batch(tmp_path, [row("good", CHAT)])
    good = run.source.read_bytes()
    odd = good.replace(b"good", b"odd").replace(b"say:hello;", b"say:h\xe9llo;")
    run.source.write_bytes(b"\xff\xfe\x00garbage\n" + odd + good)
    asyncio.run(run_batch(run))
    found = answers(run)
    assert found["good"]["response"]["status_code"] == 200
    assert found["odd"]["response"]["status_code"] == 400
    assert found["batch_line_1"]["error"]["code"] == "invalid_row" and len(found) == 3


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text("{}\n")
    with pytest.raises(ConfigError, match="no folder"):
        main(["-i", str(source), "-o", str(tmp_path / "nowhere" / "out.jsonl")])
