"""What chat and complete share: their flags, the choice between this process and a server, and reading lines."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress

from quire import env
from quire.cli.flags import FlagParser
from quire.cli.options import SampleOptions, add_engine_flags, engine_options, section_of
from quire.cli.session import LocalSession, RemoteSession, Session
from quire.errors import QuireError


def add_partner_flags(parser: FlagParser) -> None:
    """The flags of both commands."""
    parser.add_argument(
        "model_argument", metavar="MODEL", nargs="?", help="model to load in this process, or to ask the server for"
    )
    parser.add_argument("--url", help="address of a server instead, such as http://localhost:8000/v1")
    parser.add_argument("--model-name", metavar="NAME", help="model to ask the server for (default: its first one)")
    parser.add_argument("--api-key", metavar="KEY", help="key for the server (default: QUIRE_API_KEY)")
    parser.add_argument("-q", "--quick", metavar="TEXT", help="send one text, print the answer and leave")
    parser.add_argument("--stats", action="store_true", help="print counts and speed after each answer")
    parser.add_section(SampleOptions, "sampling")
    add_engine_flags(parser, without=("-q",))


def open_session(found: argparse.Namespace) -> Session:
    """A server's session with --url, else an engine in this process."""
    env.set_up_logging("warning")
    sample = section_of(SampleOptions, found)
    if found.url is not None:
        key = found.api_key or next(iter(env.api_keys()), None)
        return RemoteSession(found.url, found.model_name or found.model_argument, key, sample)
    return LocalSession(engine_options(found), sample)


@contextmanager
def forgiving() -> Iterator[None]:
    """What goes wrong with one line is said to a person, who may go on; a script is ended by it."""
    try:
        yield
    except QuireError as error:
        if not sys.stdin.isatty():
            raise
        print(error, file=sys.stderr)


def show(pieces: Iterable[str]) -> str:
    """Print an answer as it comes, up to its end or Ctrl-C, and the end of its line, whatever goes wrong. What it said."""
    said: list[str] = []
    try:
        with suppress(KeyboardInterrupt):
            for piece in pieces:
                said.append(piece)
                print(piece, end="", flush=True)
    finally:
        print()
    return "".join(said)


def ask(mark: str) -> str | None:
    """One line of input, or None at its end. The mark is shown to people only."""
    try:
        if sys.stdin.isatty():
            return input(mark)
        line = sys.stdin.readline()
        return line.rstrip("\n") if line else None
    except (EOFError, KeyboardInterrupt):
        print()
        return None
