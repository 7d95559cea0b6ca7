"""quire run-batch [MODEL] -i IN -o OUT: answer a file of OpenAI batch requests in this process, without a server."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from quire import env
from quire.cli.options import engine_options, engine_parser, section_of
from quire.config import ServeOptions, option, refuse_nonsense
from quire.errors import ConfigError


@dataclass(frozen=True, slots=True)
class BatchOptions:
    """The files."""

    input_file: str | None = option(None, help="file of requests, one JSON object a line", aliases=("-i",))
    output_file: str | None = option(
        None, help="file of answers; those that it holds are not asked again", aliases=("-o",)
    )
    concurrency: int = option(256, help="rows that are answered at once", least=1)
    overwrite: bool = option(False, help="begin the output file anew")

    def __post_init__(self) -> None:
        """Raise ConfigError for numbers that mean nothing."""
        refuse_nonsense(self)


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    parser = engine_parser("quire run-batch", "Answer a file of OpenAI batch requests.")
    parser.add_section(BatchOptions, "batch")
    found = parser.parse(argv)
    env.set_up_logging()
    options: BatchOptions = section_of(BatchOptions, found)
    if options.input_file is None or options.output_file is None:
        raise ConfigError("Give the file of requests with -i and the file for the answers with -o.")
    # Imported here: the server brings FastAPI, and mistakes in flags should answer at once.
    from quire.serve.batch import BatchRun, local_path, run_batch, summary

    source = local_path(options.input_file, "--input-file")
    target = local_path(options.output_file, "--output-file")
    if not source.is_file():
        raise ConfigError(f"There is no file {source}.")
    if not target.parent.is_dir():
        raise ConfigError(f"There is no folder {target.parent} for the answers. Make it, or name another output file.")
    if target.is_dir():
        raise ConfigError(f"{target} is a folder. Name a file for the answers.")
    if options.overwrite and target.is_file():
        target.unlink()

    from quire.engine.async_engine import AsyncEngine
    from quire.serve.app import create_app
    from quire.serve.assemble import start_service

    wanted = engine_options(found)
    service = start_service(wanted, ServeOptions(), partial(AsyncEngine.supervised, wanted))
    run = BatchRun(service, create_app(service), source, target, options.concurrency)
    seconds = asyncio.run(run_batch(run))
    print(summary(run, seconds))
    return 0
