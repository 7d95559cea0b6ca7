"""quire chat: talk to a model, in this process or on a server (--url).

/reset forgets the conversation, /system TEXT sets the system prompt, /quit or end of input leaves.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from quire.cli.flags import FlagParser
from quire.cli.partner import add_partner_flags, ask, forgiving, open_session, show
from quire.cli.session import Message, Session

COMMANDS = "/reset forgets the conversation, /system TEXT sets the system prompt, /quit leaves."


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    parser = FlagParser("quire chat", "Talk to a model, in this process or on a server.", "[MODEL]")
    parser.add_argument("--system-prompt", metavar="TEXT", help="what the model is told first")
    add_partner_flags(parser)
    found = parser.parse(argv)
    session = open_session(found)
    try:
        if found.quick is not None:
            Dialogue(session, found.system_prompt, found.stats).say(found.quick)
        else:
            if sys.stdin.isatty():
                print(COMMANDS)
            talk(Dialogue(session, found.system_prompt, found.stats))
    finally:
        session.close()
    return 0


class Dialogue:
    """The messages so far. What the user broke off with Ctrl-C stays as far as it was said."""

    def __init__(self, session: Session, system: str | None, stats: bool) -> None:
        self._session = session
        self._stats = stats
        self.restart(system)

    def restart(self, system: str | None) -> None:
        """Begin anew with this system prompt."""
        self.system = system
        self.messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]

    def say(self, text: str) -> None:
        """Send a message and print the answer as it comes. One that fails leaves the conversation as it was."""
        question = {"role": "user", "content": text}
        answer = show(self._session.chat([*self.messages, question]))
        self.messages += [question, {"role": "assistant", "content": answer}]
        if self._stats:
            print(self._session.figures.line(), file=sys.stderr)


def talk(dialogue: Dialogue) -> None:
    """Read lines until the end of input or /quit."""
    while (line := ask("> ")) is not None:
        word, _, rest = line.strip().partition(" ")
        if word in ("/quit", "/exit"):
            return
        if word == "/reset":
            dialogue.restart(dialogue.system)
        elif word == "/system":
            dialogue.restart(rest or None)
        elif word.startswith("/") and word[1:].isalpha():
            print(COMMANDS)
        elif word:
            with forgiving():
                dialogue.say(line)
