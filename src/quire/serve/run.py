"""run_server: from options to a listening server, and an orderly end. The command line only calls it.

The address is taken before the model is loaded, so that a port in use is known at once; SIGTERM lets running requests
finish within shutdown_timeout.
"""

from __future__ import annotations

import asyncio
import logging
import re
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import uvicorn
from starlette.types import ASGIApp

import quire
from quire import env
from quire.config import EngineOptions, ServeOptions
from quire.engine.async_engine import AsyncEngine
from quire.engine.child import Child, ChildProcess
from quire.engine.heap import keep_for_good
from quire.engine.metrics import Metrics
from quire.engine.supervisor import Patience
from quire.errors import ConfigError, EngineError
from quire.serve.app import create_app
from quire.serve.auth import KeyCheck, check_bind, read_keys
from quire.serve.chunks import ShortWay
from quire.serve.progress import Progress
from quire.serve.service import ModelCard, Service, fingerprint
from quire.serve.startup import Doorway, NotYet, StartReport
from quire.serve.tracing import open_tracing
from quire.text.speech import check_formats

logger = logging.getLogger(__name__)

REPORT_SECONDS = 10.0
WATCH_SECONDS = 0.5
LAST_WORDS_SECONDS = 5.0  # that aborted requests get to send their ends


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
    if options.log_format == "json":
        env.log_as_json()
    report = StartReport(time.perf_counter() if began is None else began)
    if began is not None:
        report.add("importing", time.perf_counter() - began)
    keys = read_keys(options)
    check_tls(options)
    check_formats(options.tool_call_parser, options.reasoning_parser)
    if not re.fullmatch(r"[a-zA-Z_][a-zA-Z0-9_]*", options.metrics_prefix):
        raise ConfigError("--metrics-prefix must be a word of letters, digits and _, such as quire or vllm.")
    if options.uds is None:
        check_bind(options.host, keys, options.allow_insecure)
    listener = bind(options)
    processes = Processes(new_process)

    def start() -> Service:
        return start_service(engine_options, options, report, processes)

    try:
        return asyncio.run(serve(start, options, keys, listener, report, processes.stop))
    finally:
        listener.close()


class Processes:
    """Starts engine processes, until it is stopped: then those that live are killed, which ends a start halfway."""

    def __init__(self, new_process: Callable[[], Child]) -> None:
        self._new_process = new_process
        self._started: list[Child] = []
        self._stopped = False

    def __call__(self) -> Child:
        """Start one."""
        if self._stopped:
            raise EngineError("The server was told to stop while it was starting.")
        child = self._new_process()
        self._started = [other for other in self._started if other.is_alive] + [child]
        return child

    def stop(self) -> None:
        """Start no more, and end those that live."""
        self._stopped = True
        for child in self._started:
            child.kill()


def start_service(
    engine_options: EngineOptions,
    options: ServeOptions,
    report: StartReport,
    new_process: Callable[[], Child] = ChildProcess,
) -> Service:
    """Load the model and start its engine. Raises ConfigError, ModelError and CapacityError."""
    progress = Progress()
    patience = Patience(silence=options.engine_timeout)
    if not options.engine_spare:
        patience = replace(patience, spare_after=None)
    served = engine_options.model.served_model_name or (engine_options.model.model or "bundled",)
    tracing = None if options.otlp_traces_endpoint is None else open_tracing(options.otlp_traces_endpoint, served[0])
    engine = AsyncEngine.supervised(engine_options, progress, report.add, patience, new_process)
    settings = engine.engine.settings
    names = settings.model_names or (engine_options.model.model or "bundled",)
    metrics = None
    if not engine_options.observe.disable_log_stats:
        metrics = progress.then = Metrics(names[0], settings.max_model_len)
        metrics.set_config({**asdict(engine_options.cache), "num_gpu_blocks": engine.engine.stats().pages})
    card = ModelCard(
        names=names,
        max_model_len=settings.max_model_len,
        root=_root(engine_options),
        defaults=settings.default_params,
        fingerprint=fingerprint(quire.__version__, engine_options),
        most_tokens=engine_options.model.override_generation_config.get("max_new_tokens"),
    )
    if engine.tokenizer is not None:
        engine.tokenizer.longest_token  # noqa: B018  # reads the vocabulary once, not in the first request
    return Service(
        engine,
        card,
        options,
        None if metrics is None else metrics.registry,
        progress=progress,
        log_arrivals=engine_options.observe.enable_log_requests,
        tracing=tracing,
        takes_priority=engine_options.schedule.scheduling_policy != "fcfs",
    )


def check_tls(options: ServeOptions) -> None:
    """Raise ConfigError for https options that cannot work, before the model is loaded."""
    if options.ssl_certfile is None:
        if options.ssl_keyfile or options.ssl_ca_certs:
            raise ConfigError("--ssl-keyfile and --ssl-ca-certs need --ssl-certfile, the server's certificate.")
        return
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(options.ssl_certfile, options.ssl_keyfile)
        if options.ssl_ca_certs is not None:
            context.load_verify_locations(options.ssl_ca_certs)
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError(
            f"The certificate or key for https cannot be used: {error}. Check --ssl-certfile, --ssl-keyfile and "
            "--ssl-ca-certs: PEM files, and a key that fits the certificate."
        ) from error
    if options.ssl_cert_reqs not in (0, 1, 2):
        raise ConfigError("--ssl-cert-reqs is 0 (no client certificates), 1 (checked when sent) or 2 (needed).")


def bind(options: ServeOptions) -> socket.socket:
    """The socket to listen on, taken but not yet listening. Raises ConfigError when it cannot be had."""
    address: str | tuple[str, int]
    if options.uds is not None:
        family, address, shown = socket.AF_UNIX, options.uds, options.uds
        _remove_stale(options.uds)
    else:
        is_v6 = ":" in options.host
        family = socket.AF_INET6 if is_v6 else socket.AF_INET
        address, shown = (options.host.strip("[]"), options.port), f"{options.host}:{options.port}"
    # Named, for asyncio sends without delay (TCP_NODELAY) only where it reads TCP: else a first token waits 40 ms.
    protocol = 0 if options.uds is not None else socket.IPPROTO_TCP
    listener = socket.socket(family, socket.SOCK_STREAM, protocol)
    try:
        if options.uds is None:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, OverflowError) as error:
        listener.close()
        raise ConfigError(
            f"Cannot listen on {shown}: {error}. Choose another address with --host and --port (0 takes a free one), "
            "or stop what uses it."
        ) from error
    return listener


def _remove_stale(path: str) -> None:
    """Remove a socket file that nobody listens on any more."""
    if not Path(path).is_socket():
        return
    probe = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        probe.connect(path)
    except ConnectionRefusedError:
        Path(path).unlink()
    except OSError:
        pass  # bind says what is wrong
    finally:
        probe.close()


def _root(options: EngineOptions) -> str:
    """What /v1/models tells of the model's origin: a hub id, or a folder's name without its path."""
    model = options.model.model
    if model is None:
        return "bundled"
    return Path(model).name if Path(model).exists() else model


class _Server(uvicorn.Server):
    """uvicorn, letting requests finish when it shall stop."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.service: Service | None = None  # None while it starts
        self.told_to_stop = False

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


async def serve(
    start: Callable[[], Service],
    options: ServeOptions,
    keys: tuple[str, ...],
    listener: socket.socket,
    report: StartReport,
    stop_start: Callable[[], None] = lambda: None,
) -> int:
    """Listen, start the service in a thread, and serve until told to stop; returns the exit status.

    `stop_start` makes a start that is under way end soon. Raises what the start raised.
    """
    waiting = NotYet(report)
    door = Doorway(KeyCheck(waiting, keys) if keys else waiting)
    server = _Server(_uvicorn_config(door, options))
    starting = asyncio.create_task(asyncio.to_thread(start))
    living = asyncio.create_task(_live(server, starting, door, keys, listener, report))
    try:
        await server.serve(sockets=[listener])
    finally:
        if not starting.done():
            logger.info("told to stop while %s", report.phase)
            stop_start()
        await asyncio.wait((starting,))
        living.cancel()
        await asyncio.wait((living,))
        service = server.service
        died = service is not None and not service.engine.is_running
        if service is not None:
            await service.close()
    if service is None and not server.told_to_stop:
        starting.result()
    return 1 if died else 0


def _uvicorn_config(app: ASGIApp, options: ServeOptions) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        log_level=options.uvicorn_log_level,
        log_config=None,
        access_log=options.uvicorn_log_level in ("info", "debug", "trace"),
        lifespan="off",
        root_path=options.root_path,
        http="h11",  # whose limits are known, whatever else is installed
        h11_max_incomplete_event_size=options.h11_max_incomplete_event_size,
        ssl_keyfile=options.ssl_keyfile,
        ssl_certfile=options.ssl_certfile,
        ssl_ca_certs=options.ssl_ca_certs,
        ssl_cert_reqs=options.ssl_cert_reqs,
        timeout_graceful_shutdown=int(options.shutdown_timeout + LAST_WORDS_SECONDS),
        server_header=False,
    )


async def _live(
    server: _Server,
    starting: asyncio.Task[Service],
    door: Doorway,
    keys: tuple[str, ...],
    listener: socket.socket,
    report: StartReport,
) -> None:
    """Open the door when the service is there; then watch the engine, which takes the server with it when it dies.

    So whoever supervises the process can start it again.
    """
    await asyncio.wait((starting,))
    if starting.exception() is not None:
        server.should_exit = True
        return
    service = server.service = starting.result()
    service.draining = server.told_to_stop
    door.open(ShortWay(create_app(service, keys)))
    keep_for_good()
    print("\n".join(report.lines(_address(service.options, listener), service.card.names[0], bool(keys))), flush=True)
    tasks = []
    if service.engine.tokenizer is not None:
        tasks.append(asyncio.create_task(service.server_templates.warm()))
    if isinstance(service.progress.then, Metrics):
        tasks.append(asyncio.create_task(_report(service.progress.then)))
    try:
        while service.engine.is_running:
            await asyncio.sleep(WATCH_SECONDS)
        logger.critical("the engine has stopped; the server ends with status 1")
        server.should_exit = True
    finally:
        for task in tasks:
            task.cancel()


def _address(options: ServeOptions, listener: socket.socket) -> str:
    if options.uds is not None:
        return f"--unix-socket {options.uds} http://localhost"
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1"
    scheme = "https" if options.ssl_certfile else "http"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


async def _report(metrics: Metrics) -> None:
    """Log the throughput while there is any."""
    before = metrics.totals()
    while True:
        await asyncio.sleep(REPORT_SECONDS)
        now, stats = metrics.totals(), metrics.stats
        if now != before:
            hits = stats.cache_hits / stats.cache_queries if stats.cache_queries else 0.0
            logger.info(
                "%.1f prompt tokens/s, %.1f output tokens/s, %d running, %d waiting, %.0f%% of pages, %.0f%% prefix hits",
                (now[0] - before[0]) / REPORT_SECONDS,
                (now[1] - before[1]) / REPORT_SECONDS,
                stats.running,
                stats.waiting,
                100 * stats.page_usage,
                100 * hits,
            )
        before = now
