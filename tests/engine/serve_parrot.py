"""Runs the real server loop, as a process of its own, over the engine of served.py: for tests of its end.

Arguments: shutdown timeout in seconds, delay of each step in seconds.
"""

from __future__ import annotations

import asyncio
import sys
import time
from typing import Any

from served import MAX_MODEL_LEN, Setup, engine_of, parrot

from quire import env
from quire.config import ServeOptions
from quire.engine.async_engine import AsyncEngine
from quire.engine.executor import FakeExecutor
from quire.engine.metrics import Metrics
from quire.serve.progress import Progress
from quire.serve.run import StartReport, _serve, bind
from quire.serve.service import ModelCard, Service


def main() -> int:
    options = ServeOptions(port=0, shutdown_timeout=float(sys.argv[1]))
    env.set_up_logging()
    metrics = Metrics("parrot", MAX_MODEL_LEN)
    progress = Progress(metrics)
    engine = engine_of(Setup(), FakeExecutor(parrot, delay=float(sys.argv[2])), progress)
    plain_step = engine.step

    def step() -> Any:
        """The prompt "die" ends the engine."""
        if any(generation.prompt.text == "die" for generation in engine._generations.values()):
            raise MemoryError("the machine is gone")
        return plain_step()

    engine.step = step  # type: ignore[method-assign]
    running = AsyncEngine(engine)
    running.start()
    service = Service(running, ModelCard(("parrot",), MAX_MODEL_LEN), options, metrics.registry, progress=progress)
    report = StartReport(time.perf_counter())
    report.add("nothing", 0.0)
    return asyncio.run(_serve(service, (), bind(options), report, metrics))


if __name__ == "__main__":
    sys.exit(main())
