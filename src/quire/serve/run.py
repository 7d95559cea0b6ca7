"""run_server: from options to a listening server, and an orderly end. The command line only calls it.

The address is taken before anything is loaded, so that a port in use is known at once; the engine process begins its
imports before this process does the web server's. With several API processes, this one is only their parent.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from quire import env
from quire.config import EngineOptions, ServeOptions
from quire.engine.child import Child, ChildProcess
from quire.engine.supervisor import Patience
from quire.serve.api_processes import run_api_processes
from quire.serve.listen import address_of, bind, checked_keys, make_room
from quire.serve.setup import Processes, Setup
from quire.text.chat import read_template

if TYPE_CHECKING:
    from quire.serve.progress import Progress
    from quire.serve.service import Service

logger = logging.getLogger(__name__)


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
    read_template(engine_options.model.chat_template)  # what is wrong with it is said before the model is loaded
    patience = Patience(silence=options.engine_timeout)
    if not options.engine_spare:
        patience = replace(patience, spare_after=None)
    make_room()
    listener = bind(options)
    processes = Processes(new_process)
    logger.info("starting at %s", address_of(options, listener))
    try:
        setup = Setup(engine_options, options, keys, listener, patience, processes, began)
        return run_api_processes(setup) if options.api_server_count > 1 else run_alone(setup)
    finally:
        processes.stop()
        listener.close()


def run_alone(setup: Setup) -> int:
    """Serve from this process. Returns the exit status; raises what the start raised."""
    # Imported here: the web server takes a while to import, and the engine process does its own imports meanwhile.
    from quire.engine.async_engine import AsyncEngine
    from quire.serve.assemble import start_service
    from quire.serve.serving import Entrance, Launch, serve
    from quire.serve.startup import StartReport

    report = StartReport(setup.began)
    report.add("importing", time.perf_counter() - setup.began)

    def open_engine(progress: Progress) -> AsyncEngine:
        return AsyncEngine.supervised(setup.engine, progress, report.add, setup.patience, setup.processes)

    def start() -> Service:
        return start_service(setup.engine, setup.serve, open_engine)

    entrance = Entrance(setup.listener, setup.keys, setup.serve)
    return asyncio.run(serve(entrance, Launch(start, setup.processes.stop, report)))
