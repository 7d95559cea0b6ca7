"""A real server on a real socket over the bundled model, for tests of what only a model can show."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import uvicorn

from quire.config import EngineOptions, ServeOptions
from quire.engine.async_engine import AsyncEngine
from quire.serve.app import create_app
from quire.serve.chunks import ShortWay
from quire.serve.service import ModelCard, Service
from waiting import until

ENGINE: dict[str, Any] = {
    "device": "cpu",
    "threads": 1,
    "kv_cache_memory_bytes": 1 << 27,
    "max_model_len": 256,
    "max_num_seqs": 16,
}


@contextmanager
def served_model(options: ServeOptions | None = None, **engine: Any) -> Iterator[httpx.Client]:
    """Serve the bundled model while the block runs; yields a client."""
    running = AsyncEngine.from_options(EngineOptions.from_flat(ENGINE | engine))
    card = ModelCard(("bundled",), ENGINE["max_model_len"], defaults=running.engine.settings.default_params)
    service = Service(running, card, options or ServeOptions())
    server = uvicorn.Server(
        uvicorn.Config(ShortWay(create_app(service, ())), port=0, log_level="error", lifespan="off")
    )

    async def serve() -> None:
        try:
            await server.serve()
        finally:
            await service.close()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    until(lambda: server.started or not thread.is_alive())
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join(60)
