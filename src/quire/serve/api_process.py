"""One of several API processes: `python -m quire.serve.api_process LISTENER ENGINE PARENT`, three inherited descriptors.

It serves what comes to the listening socket, from the engine that its parent has (engine/relay.py), and is told by
its parent when to end. It ends with its parent, at once.
"""

from __future__ import annotations

import asyncio
import math
import socket
import sys
from collections.abc import Sequence
from dataclasses import replace

from quire import env
from quire.engine import wire
from quire.engine.async_engine import AsyncEngine
from quire.engine.orphan import end_with, leave_signals_to_parent
from quire.engine.shared_core import SharedCore
from quire.engine.supervised import engine_over
from quire.serve.assemble import start_service
from quire.serve.listen import Listener
from quire.serve.neighbours import Begin, FromParent, Neighbours
from quire.serve.progress import Progress
from quire.serve.service import Service
from quire.serve.serving import Entrance, Launch, Place, serve
from quire.serve.startup import StartReport


def main(arguments: Sequence[str]) -> int:
    """The life of the process. Returns its exit status: 0 after an orderly end, 1 when the engine is lost."""
    leave_signals_to_parent()
    env.set_up_logging()
    listener = Listener(fileno=int(arguments[0]))
    engine_end, parents_end = (socket.socket(fileno=int(number)) for number in arguments[1:])
    end_with(parents_end.fileno())
    parent: wire.Connection[FromParent] = wire.Connection(parents_end, FromParent)
    connection: wire.Connection[wire.FromEngine] = wire.Connection(engine_end, wire.FromEngine)
    begin = first_message(parent)
    if begin.serve.log_format == "json":
        env.log_as_json()
    # Each keeps its part of the answers that may be asked for later.
    options = replace(begin.serve, max_stored_responses=math.ceil(begin.serve.max_stored_responses / begin.count))
    report = StartReport(begin.began)

    def open_engine(progress: Progress) -> AsyncEngine:
        running = AsyncEngine(engine_over(SharedCore(connection, begin.life), begin.engine, progress, report.add))
        running.start()
        return running

    def start() -> Service:
        return start_service(begin.engine, options, open_engine)

    place = Place(begin.index, Neighbours(parent), begin.again)
    launch = Launch(start, connection.close, report)
    return asyncio.run(serve(Entrance(listener, begin.keys, options), launch, place))


def first_message(parent: wire.Connection[FromParent]) -> Begin:
    """What to do, as the parent says first. Only this message is taken: the parent sends the next ones much later."""
    found: list[FromParent] = []
    while not found:
        wire.wait_for([parent.fileno()], [], None)
        found = parent.receive()
    assert isinstance(found[0], Begin), "the parent says first what to do"
    return found[0]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
