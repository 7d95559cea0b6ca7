"""serve: the web server around a service that starts, serves and drains, in one event loop.

Knows uvicorn and the service; loads nothing itself and takes no address.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from quire.config import ServeOptions
from quire.engine.heap import keep_for_good
from quire.env import announce
from quire.serve.anywhere import answer
from quire.serve.app import create_app
from quire.serve.auth import KeyCheck
from quire.serve.chunks import ShortWay
from quire.serve.connection import Connection
from quire.serve.listen import TAKEN, address_of
from quire.serve.neighbours import NOTE_SECONDS, Neighbours
from quire.serve.progress import Progress
from quire.serve.service import Service
from quire.serve.startup import Doorway, NotYet, StartReport

logger = logging.getLogger(__name__)

REPORT_SECONDS = 10.0
WATCH_SECONDS = 0.5
LAST_WORDS_SECONDS = 5.0  # that aborted requests get to send their ends


@dataclass(frozen=True, slots=True)
class Place:
    """Which of several API processes this is. `again`: it follows one that died, and its clients can wait a moment."""

    index: int
    neighbours: Neighbours
    again: bool = False


@dataclass(frozen=True, slots=True)
class Entrance:
    """Where clients come in: at this socket, with one of these keys where there are any."""

    listener: socket.socket
    keys: tuple[str, ...]
    options: ServeOptions

    @property
    def address(self) -> str:
        """As curl wants it."""
        return address_of(self.options, self.listener)


@dataclass(frozen=True, slots=True)
class Launch:
    """How the service comes about: `start` makes it in a thread and tells the report, `stop` lets that end soon."""

    start: Callable[[], Service]
    stop: Callable[[], None]
    report: StartReport


class _Server(uvicorn.Server):
    """uvicorn, letting requests finish when it shall stop. Where it has a parent, that one takes the signals."""

    def __init__(self, config: uvicorn.Config, has_parent: bool = False) -> None:
        super().__init__(config)
        self._has_parent = has_parent
        self.service: Service | None = None  # None while it starts
        self.told_to_stop = False

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Let signals end the server."""
        if self._has_parent:
            yield
            return
        with super().capture_signals():
            yield

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Stop taking requests; those that run may finish. A second signal ends them.

        The signal is dealt with here and not raised again afterwards: an orderly end is not a death by signal.
        """
        if self.service is not None:
            logger.info("signal %d: no new requests; %d may finish", sig, len(self.service.live))
            self.service.draining = True
        self.force_exit = self.told_to_stop
        self.should_exit = self.told_to_stop = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Wait for running requests up to the timeout, then end them properly, then close."""
        closer = asyncio.create_task(self._end_late_requests())
        try:
            await super().shutdown(sockets)
        finally:
            closer.cancel()

    async def _end_late_requests(self) -> None:
        if self.service is None:
            return
        await asyncio.sleep(self.service.options.shutdown_timeout)
        if self.service.live:
            logger.warning("%d requests did not finish in time and are ended", len(self.service.live))
            await self.service.engine.abort(self.service.live.engine_ids())


async def serve(entrance: Entrance, launch: Launch, place: Place | None = None) -> int:
    """Listen, start the service in a thread, and serve until told to stop; returns the exit status.

    `place`: of this process among several. Raises what the start raised, and what is wrong with options that only the
    routes understand.
    """
    waiting = NotYet(launch.report)
    closed = KeyCheck(waiting, entrance.keys) if entrance.keys else waiting
    door = Doorway(None if place is not None and place.again else closed)
    server = _Server(_uvicorn_config(door, entrance.options), has_parent=place is not None)
    if place is not None:
        server.config.backlog = 1  # for others may take from the same queue
        place.neighbours.listen(on_stop=lambda: server.handle_exit(signal.SIGTERM, None))
    starting = asyncio.create_task(asyncio.to_thread(launch.start))

    async def live() -> None:
        await asyncio.wait((starting,))
        if starting.exception() is None:
            service = server.service = starting.result()
            service.draining = server.told_to_stop
            door.open(ShortWay(create_app(service, entrance.keys)))
            await _live(
                service, launch.report.lines(entrance.address, service.card.names[0], bool(entrance.keys)), place
            )

    living = asyncio.create_task(live())
    living.add_done_callback(lambda _: setattr(server, "should_exit", True))  # whatever ended it, nobody watches now
    try:
        await server.serve(sockets=[entrance.listener])
    finally:
        if not starting.done():
            logger.info("told to stop while %s", launch.report.phase)
            launch.stop()
        await asyncio.wait((starting,))
        living.cancel()
        await asyncio.wait((living,))
        service = server.service
        died = service is not None and not service.engine.is_running
        if service is not None:
            await service.close()
    if service is None and not server.told_to_stop:
        starting.result()
    if not living.cancelled():
        living.result()
    return 1 if died else 0


def _uvicorn_config(app: ASGIApp, options: ServeOptions) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        log_level=options.uvicorn_log_level,
        log_config=None,
        access_log=options.uvicorn_log_level in ("info", "debug", "trace"),
        lifespan="off",
        root_path=options.root_path,
        http=Connection,  # over h11, whose limits are known, whatever else is installed
        backlog=TAKEN,
        h11_max_incomplete_event_size=options.h11_max_incomplete_event_size,
        ssl_keyfile=options.ssl_keyfile,
        ssl_certfile=options.ssl_certfile,
        ssl_ca_certs=options.ssl_ca_certs,
        ssl_cert_reqs=options.ssl_cert_reqs,
        timeout_graceful_shutdown=int(options.shutdown_timeout + LAST_WORDS_SECONDS),
        server_header=False,
    )


async def _live(service: Service, lines: list[str], place: Place | None) -> None:
    """Say that the server is ready; then watch the engine, which takes the server with it when it dies, so that whoever
    supervises the process can start it again.
    """
    keep_for_good()
    tasks = []
    if place is None:
        announce(lines)
    else:
        service.neighbours = place.neighbours
        place.neighbours.up(lines, partial(answer, service))
        tasks.append(asyncio.create_task(_note(service)))
    if service.engine.tokenizer is not None:
        tasks.append(asyncio.create_task(service.server_templates.warm()))
    if service.registry is not None and (place is None or place.index == 0):
        tasks.append(asyncio.create_task(_report(service.progress)))
    try:
        while service.engine.is_running:
            await asyncio.sleep(WATCH_SECONDS)
        logger.critical("the engine has stopped; the server ends with status 1")
    finally:
        for task in tasks:
            task.cancel()


async def _note(service: Service) -> None:
    """Keep the parent informed of what was counted."""
    while True:
        await asyncio.sleep(NOTE_SECONDS)
        service.note_counts()


async def _report(progress: Progress) -> None:
    """Log the throughput while there is any."""
    before = progress.stats
    while True:
        await asyncio.sleep(REPORT_SECONDS)
        now = progress.stats
        prompt, made = now.prompt_tokens - before.prompt_tokens, now.generated_tokens - before.generated_tokens
        if prompt or made:
            hits = now.cache_hits / now.cache_queries if now.cache_queries else 0.0
            logger.info(
                "%.1f prompt tokens/s, %.1f output tokens/s, %d running, %d waiting, %.0f%% of pages, %.0f%% prefix hits",
                prompt / REPORT_SECONDS,
                made / REPORT_SECONDS,
                now.running,
                now.waiting,
                100 * now.page_usage,
                100 * hits,
            )
        before = now
