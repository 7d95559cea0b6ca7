"""Batch files: rows of requests in, rows of answers out, through the server's own routes but without HTTP.

The output tells what is done, so an interrupted run goes on where it was. Knows no model.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import msgspec
from starlette.types import ASGIApp, Message, Scope

from quire.errors import CapacityError, ConfigError, EngineDeadError, reason
from quire.serve.service import Service

logger = logging.getLogger(__name__)

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/embeddings")
REPORT_SECONDS = 10.0
RETRY_SECONDS = 0.5  # after which a row is tried again that a full queue refused


@dataclass(frozen=True, slots=True)
class Answer:
    """What a route said."""

    status: int
    body: bytes
    request_id: str


@dataclass(slots=True)
class BatchRun:
    """One run over one file. The counts are of rows: answered now, found done, answered with an error."""

    service: Service
    app: ASGIApp
    source: Path
    target: Path
    concurrency: int
    answered: int = 0
    skipped: int = 0
    failed: int = 0
    _done: set[str] = field(default_factory=set)
    _seen: set[str] = field(default_factory=set)

    async def run(self) -> None:
        """Answer all rows that the output does not hold yet. EngineDeadError when the engine stopped on the way,
        CapacityError when the answers cannot be written.
        """
        self._done = done_rows(self.target)
        reporter = asyncio.create_task(self._report())
        try:
            # A byte that is no UTF-8 makes its own row wrong and no other.
            with (
                self.source.open(encoding="utf-8", errors="surrogateescape") as source,
                self.target.open("a", encoding="utf-8") as sink,
            ):
                lines = enumerate(source, 1)
                tasks = [asyncio.create_task(self._work(lines, sink)) for _ in range(self.concurrency)]
                try:
                    await asyncio.gather(*tasks)
                finally:
                    for task in tasks:
                        task.cancel()
                    await asyncio.gather(*tasks, return_exceptions=True)
                    if self.target.is_file():  # and no pipe
                        os.fsync(sink.fileno())
        except OSError as error:
            raise CapacityError(
                f"The answers cannot be written to {self.target}: {reason(error)}. Make room there and give the same "
                "command again: it keeps the answers that the file holds and goes on behind them."
            ) from error
        finally:
            reporter.cancel()

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(REPORT_SECONDS)
            logger.info("%d rows answered, %d of them with an error", self.answered, self.failed)

    async def _work(self, lines: Iterator[tuple[int, str]], sink: TextIO) -> None:
        """Take lines until there are none; all workers take from the same file."""
        for number, line in lines:
            if not line.strip():
                continue
            row = await self._answer_line(number, line)
            if row is None:
                self.skipped += 1
                continue
            sink.write(json.dumps(row, ensure_ascii=False).encode("utf-8", "replace").decode() + "\n")
            sink.flush()
            self.answered += 1
            self.failed += row["error"] is not None or row["response"]["status_code"] != 200

    async def _answer_line(self, number: int, line: str) -> dict[str, Any] | None:
        """The output row of a line, None when it is there already."""
        own_id = f"batch_line_{number}"  # by which a row is known that has no name of its own
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        name = row.get("custom_id") if isinstance(row, dict) else None
        if not isinstance(name, str) or not name:
            problem = "The line is not JSON." if row is None else "custom_id must be a string that is not empty."
            return None if own_id in self._done else _failed_row(own_id, None, "invalid_row", problem)
        if name in self._seen:
            problem = "An earlier line has the same custom_id."
            return None if own_id in self._done else _failed_row(own_id, name, "duplicate_custom_id", problem)
        self._seen.add(name)
        if name in self._done:
            return None
        problem = _problem(row)
        if problem:
            return _failed_row(own_id, name, "invalid_row", problem)
        answer = await self._ask(row["url"], row["body"])
        return {
            "id": f"batch_req_{uuid.uuid4().hex}",
            "custom_id": name,
            "response": {
                "status_code": answer.status,
                "request_id": answer.request_id,
                "body": msgspec.json.decode(answer.body) if answer.body else None,
            },
            "error": None,
        }

    async def _ask(self, url: str, body: dict[str, Any]) -> Answer:
        """The route's answer. A full queue is waited for; an engine that stopped ends the run."""
        content = json.dumps(body).encode()
        while True:
            answer = await ask(self.app, url, content)
            if not self.service.engine.is_running:
                raise EngineDeadError(
                    "The engine has stopped. The rows answered so far are kept; run it again to go on."
                )
            if answer.status != 503:
                return answer
            await asyncio.sleep(RETRY_SECONDS)


def _problem(row: dict[str, Any]) -> str:
    """What is wrong with the frame of a row; the body is the route's matter."""
    if row.get("method", "POST") != "POST":
        return "method must be POST."
    if row.get("url") not in URLS:
        return f"url must be one of {', '.join(URLS)}."
    if not isinstance(row.get("body"), dict):
        return "body must be an object."
    if row["body"].get("stream"):
        return "A row of a batch cannot be streamed. Leave stream out."
    if row["body"].get("background"):
        return "A row of a batch cannot run in the background. Leave background out."
    return ""


def _failed_row(own_id: str, name: str | None, code: str, message: str) -> dict[str, Any]:
    return {"id": own_id, "custom_id": name, "response": None, "error": {"code": code, "message": message}}


def done_rows(target: Path) -> set[str]:
    """The names of the rows in an output file, which loses a last line that is cut off. Raises ConfigError.

    A pipe, as /dev/stdout may be, holds none.
    """
    if not target.is_file():
        return set()
    found: set[str] = set()
    good = 0  # bytes of whole lines
    with target.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                row = json.loads(line)
                # A row without an answer of its own is known by its line.
                found.add(row["id"] if row["id"].startswith("batch_line_") else row["custom_id"])
                if row["custom_id"] is not None and row["error"] and row["error"]["code"] != "duplicate_custom_id":
                    found.add(row["custom_id"])
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ConfigError(
                    f"{target} is not the output of a batch: line {number} is no answer. Choose another output file, "
                    "or begin anew with --overwrite."
                ) from error
            good += len(line)
    if good < target.stat().st_size:
        logger.warning("the last line of %s is cut off; its row is answered again", target)
        os.truncate(target, good)
    return found


async def ask(app: ASGIApp, path: str, content: bytes) -> Answer:
    """POST JSON to a route of an ASGI application in this process."""
    request_id = uuid.uuid4().hex
    scope: Scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"content-type", b"application/json"), (b"x-request-id", request_id.encode())],
        "client": None,
        "server": None,
    }
    sent: list[Message] = []
    pending = [{"type": "http.request", "body": content, "more_body": False}]

    async def receive() -> Message:
        if not pending:
            await asyncio.Event().wait()  # this client never leaves
        return pending.pop()

    async def send(message: Message) -> None:
        sent.append(message)

    await app(scope, receive, send)
    return Answer(sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:]), request_id)


def local_path(name: str, option: str) -> Path:
    """The path of a local file; an address raises ConfigError: a batch fetches nothing and sends nothing."""
    if "://" in name:
        raise ConfigError(f"{option} is {name!r}; it must be a local file. Fetch it first.")
    return Path(name)


def summary(run: BatchRun, seconds: float) -> str:
    """One line about a finished run."""
    return (
        f"{run.answered} rows answered in {seconds:.1f} s, {run.failed} of them with an error; "
        f"{run.skipped} were there already."
    )


async def run_batch(run: BatchRun) -> float:
    """Do a run and close the service; the seconds it took."""
    began = time.perf_counter()
    try:
        await run.run()
    finally:
        await run.service.close()
    return time.perf_counter() - began
