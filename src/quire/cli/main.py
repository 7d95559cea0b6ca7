"""The quire command: finds the subcommand, runs it, turns errors into one paragraph and an exit status.

Imports nothing heavy, so that help and mistakes in flags answer at once.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from io import TextIOWrapper

from quire import env
from quire.errors import ConfigError, QuireError, nearest

COMMANDS = {
    "serve": ("quire.cli.serve", "serve a model over HTTP, as the OpenAI API does"),
    "run-batch": ("quire.cli.run_batch", "answer a file of OpenAI batch requests, without a server"),
    "run": ("quire.cli.run", "complete one prompt and stream the text"),
    "chat": ("quire.cli.chat", "talk to a model, in this process or on a server"),
    "complete": ("quire.cli.complete", "complete prompts line by line, in this process or on a server"),
    "plan": ("quire.cli.plan", "say what a model will need and how fast it will be, without loading it"),
    "verify": ("quire.cli.verify", "compare a model's logits with those of Transformers"),
    "bench": ("quire.cli.bench", "measure latency, throughput, or a server"),
    "collect-env": ("quire.cli.collect", "print versions and hardware, for reports"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit status: 0, 1 for an error, 2 for a mistake in flags, 130 for Ctrl-C."""
    words = list(sys.argv[1:] if argv is None else argv)
    env.open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # where the locale has no word for what a model says
    try:
        return run_command(words)
    finally:
        env.drop_full_streams()


def run_command(words: Sequence[str]) -> int:
    """Run the command that the words name; turn what it raises into a line and a status."""
    name = f"quire {words[0]}" if words and words[0] in COMMANDS else "quire"
    try:
        status = _answer(words)
        if sys.stdout is not None:
            sys.stdout.flush()
        return status
    except ConfigError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except QuireError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 0  # the reader, such as head, has seen enough
    except OSError as error:  # a full disk, a limit of the system
        print(f"{name}: {error}", file=sys.stderr)
        return 1


def _answer(words: Sequence[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if words[0] in ("-v", "--version"):
        from quire import __version__

        print(f"quire {__version__}")
        return 0
    if words[0] not in COMMANDS:
        print(f"quire: no command {words[0]!r}.{nearest(words[0], COMMANDS)}\nTry 'quire --help'.", file=sys.stderr)
        return 2
    return importlib.import_module(COMMANDS[words[0]][0]).main(words[1:])


def usage() -> str:
    """What `quire --help` prints."""
    lines = [f"  {name:<12} {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: quire COMMAND [options]",
            "",
            "commands:",
            *lines,
            "",
            "quire COMMAND --help shows a command's options.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
