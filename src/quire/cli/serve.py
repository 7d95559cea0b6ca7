"""quire serve [MODEL]: serve a model over HTTP until it is told to stop."""

from __future__ import annotations

import time
from collections.abc import Sequence

from quire import env
from quire.cli.options import engine_options, engine_parser, section_of
from quire.config import ServeOptions


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    began = time.perf_counter()
    parser = engine_parser("quire serve", "Serve a model over HTTP, as the OpenAI API does.")
    parser.add_section(ServeOptions, "server")
    found = parser.parse(argv)
    env.set_up_logging()
    options = engine_options(found)
    # Imported here: the server brings torch and FastAPI, and mistakes in flags should answer at once.
    from quire.serve.run import run_server

    return run_server(options, section_of(ServeOptions, found), began)
