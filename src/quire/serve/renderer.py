"""RenderPool: chat templates are rendered in small processes, each request within a time and a size.

A process that takes too long is killed and another started; nobody else waits for it, for there are several. Knows
frames and limits; what is rendered is the matter of quire.text.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import quire.text
from quire.errors import ClientError, OverloadedError, ValidationError
from quire.text.tokenizer import refusal

logger = logging.getLogger(__name__)

WORKER = Path(quire.text.__file__).with_name("render_worker.py")
LONGEST_TEXT = 32 * 2**20  # characters
START_SECONDS = 60.0  # that a process may take to start, on a very busy machine
RETRY_SECONDS = 5.0  # after which clients may come back where none can be started


@dataclass(slots=True)
class _Child:
    """One process and its pipe."""

    process: subprocess.Popen[bytes]
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def ask(self, frame: bytes, seconds: float) -> dict[str, str]:
        """Its answer. TimeoutError when it takes longer, IncompleteReadError or OSError when it dies."""
        async with asyncio.timeout(seconds):
            return json.loads(await self._exchange(frame))

    async def _exchange(self, frame: bytes) -> bytes:
        self.writer.write(frame)
        await self.writer.drain()
        return await self.reader.readexactly(int.from_bytes(await self.reader.readexactly(4)))

    async def ready(self) -> None:
        """Wait until it has started."""
        async with asyncio.timeout(START_SECONDS):
            await self.reader.readexactly(4)

    def kill(self) -> None:
        """End it now."""
        self.process.kill()
        self.process.wait()
        self.writer.close()


class RenderPool:
    """Up to `size` processes, started when first needed. Belongs to one event loop."""

    def __init__(self, size: int, seconds: float, chars: int = LONGEST_TEXT) -> None:
        self._seconds = seconds
        self._chars = chars
        self._room = asyncio.Semaphore(size)
        self._idle: list[_Child] = []
        self._busy: set[asyncio.Task[str]] = set()

    async def warm(self) -> None:
        """Have a process ready, so that the first request does not wait for it. Where none can be had, requests say so."""
        with contextlib.suppress(ClientError):
            await self.render({"template": "ready", "messages": [{}], "variables": {}} | _NOTHING)

    async def render(self, job: dict[str, Any]) -> str:
        """The text of a job, see quire.text.chat.render_job. ValidationError for what the template cannot do in time."""
        content = json.dumps(job | {"chars": self._chars}).encode()
        task = asyncio.ensure_future(self._render(len(content).to_bytes(4) + content))
        self._busy.add(task)
        task.add_done_callback(self._busy.discard)
        # Whoever asked may leave; the process is in order again only when it has answered.
        return await asyncio.shield(task)

    async def _render(self, frame: bytes) -> str:
        async with self._room:
            try:
                reply = await self._ask(frame)
            except (EOFError, ConnectionError):  # somebody ended the process, perhaps this very template
                reply = await self._ask_again(frame)
        if "text" in reply:
            return reply["text"]
        raise refusal(reply)

    async def _ask(self, frame: bytes) -> dict[str, str]:
        """A process's answer. One that takes too long, or does not answer, is ended."""
        child = self._idle.pop() if self._idle else await _start()
        try:
            reply = await child.ask(frame, self._seconds)
        except BaseException as error:
            child.kill()
            if isinstance(error, TimeoutError):
                logger.warning("a chat template was ended after %g s", self._seconds)
                raise ValidationError(
                    f"The chat template was not done with these messages after {self._seconds:g} s.", "messages"
                ) from error
            raise
        self._idle.append(child)
        return reply

    async def _ask_again(self, frame: bytes) -> dict[str, str]:
        try:
            return await self._ask(frame)
        except (EOFError, ConnectionError) as error:
            logger.warning("a chat template ended its process twice")
            raise ValidationError("The chat template cannot be rendered with these messages.", "messages") from error

    async def close(self) -> None:
        """End all processes."""
        for task in list(self._busy):
            task.cancel()
        await asyncio.gather(*self._busy, return_exceptions=True)
        while self._idle:
            self._idle.pop().kill()


_NOTHING = {"tools": None, "documents": None, "add_generation_prompt": False, "continue_final_message": False}


async def _start() -> _Child:
    """A new process. OverloadedError where the system has none to give, or no file, or no memory for it."""
    try:
        return await _launch()
    except (OSError, EOFError) as error:  # TimeoutError is one
        logger.error("no process can be started to render chat templates: %r", error)
        raise OverloadedError(
            "The server cannot start a process to render the chat template.", RETRY_SECONDS
        ) from error


async def _launch() -> _Child:
    """It gets the module path and nothing else of the environment, where keys may be."""
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-P", str(WORKER)],
            stdin=theirs.fileno(),
            stdout=theirs.fileno(),
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the server, which lets running requests finish
            env={"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )
    reader, writer = await asyncio.open_unix_connection(sock=ours)
    child = _Child(process, reader, writer)
    try:
        await child.ready()
    except BaseException:
        child.kill()
        raise
    return child
