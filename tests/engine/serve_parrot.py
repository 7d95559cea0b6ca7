"""Runs the real server loop, as a process of its own, over the engine of served.py: for tests of its end.

Arguments: shutdown timeout in seconds, delay of each step in seconds, and, where wanted, a file: the start goes on until
it is there. Then a key is needed, and the address is printed before the start.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from pathlib import Path
from typing import Any

from served import MAX_MODEL_LEN, Setup, engine_of, parrot

from quire import env
from quire.config import ServeOptions
from quire.engine.async_engine import AsyncEngine
from quire.engine.executor import FakeExecutor
from quire.engine.metrics import Metrics
from quire.errors import EngineError
from quire.serve.listen import address_of, bind
from quire.serve.progress import Progress
from quire.serve.service import ModelCard, Service
from quire.serve.serving import Entrance, Launch, serve
from quire.serve.startup import StartReport


def main() -> int:
    awaited = Path(sys.argv[3]) if len(sys.argv) > 3 else None
    options = ServeOptions(port=0, shutdown_timeout=float(sys.argv[1]))
    listener = bind(options)
    if awaited is not None:
        print(address_of(options, listener), flush=True)
    env.set_up_logging()
    metrics = Metrics("parrot", MAX_MODEL_LEN)
    progress = Progress(metrics)
    engine = engine_of(Setup(), FakeExecutor(parrot, delay=float(sys.argv[2])), progress)
    plain_step = engine.step

    def step(at_most: int) -> Any:
        """The prompt "die" ends the engine."""
        if any(generation.prompt.text == "die" for generation in engine._generations.values()):
            raise MemoryError("the machine is gone")
        return plain_step(at_most)

    engine.step = step  # type: ignore[method-assign]
    running = AsyncEngine(engine)
    running.start()
    service = Service(running, ModelCard(("parrot",), MAX_MODEL_LEN), options, metrics.registry, progress=progress)
    report = StartReport()
    report.add("nothing", 0.0)
    stopped = threading.Event()

    def start() -> Service:
        report.add("pretending", None)
        while awaited is not None and not awaited.exists():
            if stopped.wait(0.01):
                raise EngineError("told to stop")
        return service

    entrance = Entrance(listener, ("secret",) if awaited else (), options)
    return asyncio.run(serve(entrance, Launch(start, stopped.set, report)))


if __name__ == "__main__":
    sys.exit(main())
