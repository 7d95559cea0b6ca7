"""Store: answers of /v1/responses that clients may ask for again or go on from. In memory, bounded, oldest first out.

Knows no engine and no HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

from quire.errors import NotFoundError

MOST_CHARS = 128 * 2**20  # of all stored conversations together


@dataclass(slots=True)
class Stored:
    """One response: its latest state, and the conversation that leads up to its answer.

    `items`: its own input. `events`: what those who follow it are told, where it can be followed.
    """

    tenant: str
    body: dict[str, Any]
    messages: list[dict[str, Any]] = field(default_factory=list)
    items: list[dict[str, Any]] = field(default_factory=list)
    events: list[bytes] | None = None
    task: asyncio.Task[None] | None = None  # while it runs in the background
    chars: int = 0
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    def run(self, work: Coroutine[Any, Any, None]) -> None:
        """Let it be made in the background."""
        self.task = asyncio.ensure_future(work)
        self.task.add_done_callback(lambda _: self._wake())

    @property
    def runs(self) -> bool:
        """Whether it is being made in the background."""
        return self.task is not None and not self.task.done()

    def tell(self, event: bytes) -> None:
        """The next event."""
        assert self.events is not None, "it can be followed"
        self.events.append(event)
        self._wake()

    def _wake(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()

    async def events_from(self, number: int, seconds: float) -> list[bytes]:
        """Events from this number on: those that are there, else the next one, if it comes in time."""
        assert self.events is not None, "it can be followed"
        if len(self.events) <= number and self.runs:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._news.wait()
        return self.events[number:]


@dataclass(slots=True)
class Store:
    """Responses by id. Another tenant's is as good as none."""

    most: int
    _found: OrderedDict[str, Stored] = field(default_factory=OrderedDict)
    _chars: int = 0

    def __len__(self) -> int:
        return len(self._found)

    def put(self, stored: Stored) -> None:
        """Keep a response, or its new state; the oldest that do not run give way."""
        key = stored.body["id"]
        if key in self._found:
            self._chars -= self._found.pop(key).chars
        stored.chars = sum(len(str(message["content"])) for message in stored.messages)
        stored.chars += sum(map(len, stored.events or ()))
        self._found[key] = stored
        self._chars += stored.chars
        for old in [key for key, kept in self._found.items() if not kept.runs]:
            if len(self._found) <= self.most and self._chars <= MOST_CHARS:
                break
            self._chars -= self._found.pop(old).chars

    def get(self, key: str, tenant: str) -> Stored:
        """A tenant's response. Raises NotFoundError."""
        found = self._found.get(key)
        if found is None or found.tenant != tenant:
            raise NotFoundError(
                "There is no response with this id. It may have given way to newer ones.", "response_id"
            )
        return found

    def remove(self, key: str, tenant: str) -> None:
        """Forget a response; one that runs is ended."""
        found = self.get(key, tenant)
        if found.task is not None:
            found.task.cancel()
        self._chars -= self._found.pop(key).chars

    async def close(self) -> None:
        """End everything that runs in the background."""
        tasks = [found.task for found in self._found.values() if found.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
