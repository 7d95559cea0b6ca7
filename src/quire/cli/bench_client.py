"""One streamed request to an OpenAI-compatible server, with the time of each piece. The standard library alone.

Knows HTTP and server-sent events, no statistics.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
import urllib.parse
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

MOST_LINE = 2**24  # bytes of one event


@dataclass(slots=True)
class Answer:
    """What came of one request. Times are readings of time.perf_counter(); `error` is empty where it succeeded."""

    prompt_tokens: int
    began: float
    pieces: list[float] = field(default_factory=list)  # when each piece of text came
    output_tokens: int = 0
    ended: float = 0.0
    error: str = ""

    @property
    def first(self) -> float:
        """Seconds to the first piece."""
        return self.pieces[0] - self.began if self.pieces else 0.0

    @property
    def whole(self) -> float:
        """Seconds to the end."""
        return self.ended - self.began

    @property
    def per_token(self) -> float:
        """Seconds for each token after the first."""
        return (self.whole - self.first) / max(1, self.output_tokens - 1)

    @property
    def gaps(self) -> list[float]:
        """Seconds between neighbouring pieces."""
        return [later - earlier for earlier, later in zip(self.pieces, self.pieces[1:], strict=False)]


@dataclass(frozen=True, slots=True)
class Server:
    """Where to send requests. `url` is the base, such as http://127.0.0.1:8000."""

    url: str
    headers: dict[str, str] = field(default_factory=dict)

    async def get(self, path: str) -> Any:
        """The JSON of a GET. Raises OSError for a server that cannot be reached, ValueError for what is no answer."""
        async with self._exchange("GET", path, b"") as (status, lines):
            text = b"".join([line async for line in lines])
        if status != 200:
            raise ValueError(f"the server answered {status}: {text[:200].decode(errors='replace')}")
        return json.loads(text)

    async def stream(self, path: str, body: dict[str, Any], prompt_tokens: int) -> Answer:
        """Send one request and read its stream to the end. What goes wrong is in the answer."""
        answer = Answer(prompt_tokens, time.perf_counter())
        try:
            async with self._exchange("POST", path, json.dumps(body).encode()) as (status, lines):
                if status != 200:
                    text = b"".join([line async for line in lines])
                    answer.error = f"status {status}: {text[:200].decode(errors='replace')}"
                else:
                    await _read(lines, answer)
        except (OSError, ValueError, asyncio.IncompleteReadError) as error:
            answer.error = f"{type(error).__name__}: {error}"
        answer.ended = time.perf_counter()
        if not answer.error and not answer.pieces:
            answer.error = "the stream held no text"
        return answer

    @asynccontextmanager
    async def _exchange(self, method: str, path: str, body: bytes) -> AsyncIterator[tuple[int, AsyncIterator[bytes]]]:
        """One request on a connection of its own: the status, and the lines of the body as they come."""
        found = urllib.parse.urlsplit(self.url)
        context = ssl.create_default_context() if found.scheme == "https" else None
        port = found.port or (443 if context else 80)
        reader, writer = await asyncio.open_connection(found.hostname, port, ssl=context, limit=MOST_LINE)
        try:
            lines = [f"{method} {found.path.rstrip('/')}{path} HTTP/1.1", f"Host: {found.netloc}", "Connection: close"]
            lines += [f"{name}: {value}" for name, value in self.headers.items()]
            lines += ["Content-Type: application/json", f"Content-Length: {len(body)}", "", ""]
            writer.write("\r\n".join(lines).encode() + body)
            await writer.drain()
            status = int((await reader.readline()).split()[1])
            headers: dict[str, str] = {}
            while (line := await reader.readline()).strip():
                name, _, value = line.decode("latin-1").partition(":")
                headers[name.strip().lower()] = value.strip().lower()
            yield status, _lines(reader, headers.get("transfer-encoding") == "chunked")
        finally:
            writer.close()


async def _lines(reader: asyncio.StreamReader, chunked: bool) -> AsyncIterator[bytes]:
    """The lines of a body; the last one may have no end."""
    if not chunked:
        while line := await reader.readline():
            yield line
        return
    held = b""
    while size := int((await reader.readline()).split(b";")[0], 16):
        held += await reader.readexactly(size)
        await reader.readexactly(2)
        *whole, held = held.split(b"\n")
        for line in whole:
            yield line + b"\n"
    if held:
        yield held


async def _read(lines: AsyncIterator[bytes], answer: Answer) -> None:
    """Take in the events of a stream."""
    counted = 0
    async for line in lines:
        if not line.startswith(b"data:") or line.strip() == b"data: [DONE]":
            continue
        now = time.perf_counter()
        event = json.loads(line[5:])
        if "error" in event:
            answer.error = f"the stream broke off: {str(event['error'])[:200]}"
            return
        if event.get("usage"):
            answer.prompt_tokens = event["usage"]["prompt_tokens"]
            counted = event["usage"]["completion_tokens"]
        for choice in event.get("choices") or ():
            if choice.get("text") or (choice.get("delta") or {}).get("content") or choice.get("finish_reason"):
                answer.pieces.append(now)
    answer.output_tokens = counted or len(answer.pieces)
