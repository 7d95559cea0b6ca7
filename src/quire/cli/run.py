"""quire run [MODEL] "prompt": complete one prompt in this process and stream the text to stdout."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from quire import env
from quire.cli.flags import FlagParser
from quire.cli.options import SampleOptions, add_engine_flags, engine_options, section_of, split_model
from quire.cli.session import LocalSession, Session


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    parser = FlagParser("quire run", "Complete one prompt and stream the text.", "[MODEL] PROMPT")
    parser.add_argument("words", metavar="[MODEL] PROMPT", nargs="+", help="a model, and the prompt; - reads stdin")
    parser.add_argument("--chat", action="store_true", help="send the prompt as a user's message")
    parser.add_argument("--stats", action="store_true", help="print counts and speed at the end")
    parser.add_section(SampleOptions, "sampling")
    add_engine_flags(parser)
    found = parser.parse(argv)
    env.set_up_logging("warning")
    found.model_argument, prompt = split_model(found.words)
    session = LocalSession(engine_options(found), section_of(SampleOptions, found))
    try:
        text = sys.stdin.read() if prompt == "-" else prompt
        answer(session, text, found.chat)
        if found.stats:
            print(session.figures.line(), file=sys.stderr)
    finally:
        session.close()
    return 0


def answer(session: Session, text: str, as_message: bool) -> None:
    """Print the answer as it comes; a completion begins with the prompt itself."""
    if as_message:
        stream = session.chat([{"role": "user", "content": text}])
    else:
        print(text, end="", flush=True)
        stream = session.complete(text)
    for piece in stream:
        print(piece, end="", flush=True)
    print()
