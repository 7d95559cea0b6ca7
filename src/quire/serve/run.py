"""run_server: from options to a listening server, and an orderly end. The command line only calls it.

The address is taken before anything is loaded, so that a port in use is known at once; the engine process begins its
imports before this process does the web server's. With several API processes, this one is only their parent.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from quire import env
from quire.config import EngineOptions, ServeOptions
from quire.engine.child import Child, ChildProcess
from quire.engine.supervisor import Patience
from quire.errors import EngineError
from quire.serve.fronts import run_fronts
from quire.serve.listen import bind, checked_keys

if TYPE_CHECKING:
    from quire.serve.service import Service


def run_server(
    engine_options: EngineOptions,
    options: ServeOptions,
    began: float | None = None,
    new_process: Callable[[], Child] = ChildProcess,
) -> int:
    """Serve until SIGINT or SIGTERM; returns the exit status: 0 after an orderly end, 1 when the engine died.

    `began` is the time.perf_counter() at which the process started its work; `new_process` starts an engine process.
    The server listens at once and says what it is doing until it is ready. Raises ConfigError, ModelError and
    CapacityError for what cannot be started.
    """
    began = time.perf_counter() if began is None else began
    if options.log_format == "json":
        env.log_as_json()
    keys = checked_keys(options)
    patience = Patience(silence=options.engine_timeout)
    if not options.engine_spare:
        patience = replace(patience, spare_after=None)
    listener = bind(options)
    processes = Processes(new_process)
    try:
        if options.api_server_count > 1:
            return run_fronts(engine_options, options, keys, listener, began, patience, processes)
        return run_alone(engine_options, options, keys, listener, began, patience, processes)
    finally:
        processes.stop()
        listener.close()


def run_alone(
    engine_options: EngineOptions,
    options: ServeOptions,
    keys: tuple[str, ...],
    listener: socket.socket,
    began: float,
    patience: Patience,
    processes: Processes,
) -> int:
    """Serve from this process. Returns the exit status; raises what the start raised."""
    # Imported here: the web server takes a while to import, and the engine process does its own imports meanwhile.
    from quire.engine.async_engine import AsyncEngine
    from quire.serve.assemble import start_service
    from quire.serve.serving import serve
    from quire.serve.startup import StartReport

    report = StartReport(began)
    report.add("importing", time.perf_counter() - began)

    def start() -> Service:
        return start_service(
            engine_options,
            options,
            lambda progress: AsyncEngine.supervised(engine_options, progress, report.add, patience, processes),
        )

    return asyncio.run(serve(start, options, keys, listener, report, processes.stop))


class Processes:
    """Starts engine processes, the first one before it is needed, until it is stopped: then those that live are killed,
    which ends a start halfway.
    """

    def __init__(self, new_process: Callable[[], Child]) -> None:
        self._new_process = new_process
        self._started: list[Child] = []
        self._stopped = False
        self._first: Child | None = new_process()
        self._started.append(self._first)

    def __call__(self) -> Child:
        """Start one."""
        if self._stopped:
            raise EngineError("The server was told to stop while it was starting.")
        first, self._first = self._first, None
        child = first or self._new_process()
        self._started = [other for other in self._started if other is not child and other.is_alive] + [child]
        return child

    def stop(self) -> None:
        """Start no more, and end those that live."""
        self._stopped = True
        for child in self._started:
            child.kill()
