"""quire complete: complete prompts line by line, in this process or on a server (--url)."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from quire.cli.flags import FlagParser
from quire.cli.partner import add_partner_flags, ask, forgiving, open_session, show
from quire.cli.session import Session


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    parser = FlagParser("quire complete", "Complete prompts line by line.", "[MODEL]")
    add_partner_flags(parser)
    found = parser.parse(argv)
    session = open_session(found)
    try:
        if found.quick is not None:
            complete(session, found.quick, found.stats)
        else:
            while (line := ask("> ")) is not None:
                if line.strip():
                    with forgiving():
                        complete(session, line, found.stats)
    finally:
        session.close()
    return 0


def complete(session: Session, prompt: str, stats: bool) -> None:
    """Print the completion as it comes."""
    show(session.complete(prompt))
    if stats:
        print(session.figures.line(), file=sys.stderr)
