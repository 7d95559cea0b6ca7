"""The real server over the engine of fake_engine.py: python bench/fake_server.py RATE ROWS [flags of quire serve].

Used by the benches and the soak tests of the server.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from server_process import StartedServer, server_process

from quire import env
from quire.cli.options import engine_options, engine_parser, section_of
from quire.config import ServeOptions
from quire.engine.child import ChildProcess
from quire.serve.run import run_server

HERE = Path(__file__).parent


@contextmanager
def fake_server(rate: float, rows: int, *flags: str) -> Iterator[StartedServer]:
    """This program in a process of its own."""
    with server_process([sys.executable, __file__, str(rate), str(rows), "--port", "0", *flags]) as started:
        yield started


def main() -> int:
    """Serve."""
    rate, rows, *flags = sys.argv[1:]
    command = (sys.executable, str(HERE / "fake_engine.py"), rate, rows)
    parser = engine_parser("fake_server", "The server over a clock.")
    parser.add_section(ServeOptions, "server")
    found = parser.parse(flags)
    env.set_up_logging()
    options = section_of(ServeOptions, found)
    return run_server(engine_options(found), options, new_process=partial(ChildProcess, command))


if __name__ == "__main__":
    sys.exit(main())
