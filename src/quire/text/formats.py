"""What a format is: how a family of models writes tool calls, or its reasoning, as plain data.

The tables are in tool_formats.py and reasoning_formats.py; one parser reads all of them (format_parser.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeVar

from quire.errors import ConfigError

Ending = Literal["marker", "quoted", "value"]


@dataclass(frozen=True, slots=True)
class Region:
    """A stretch of text that holds tool calls.

    It begins with `opener` and ends, by `ending`, with `closer` wherever that stands ("marker"), with `closer` outside
    of JSON strings ("quoted"), or with the last bracket of its value ("value"). `reader` names what reads its inside.
    A region with `bare` has no marker of its own: the opener belongs to the value, and counts only at the beginning of
    the text or behind another call.
    """

    opener: str
    closer: str
    reader: str
    ending: Ending = "quoted"
    bare: bool = False


@dataclass(frozen=True, slots=True)
class Writing:
    """How a grammar lets calls be written.

    A call is `begin`, where NAME stands for the tool's name and # for a number, the arguments, `end`; calls are apart by
    `between`, and all of them stand between `before` and `after`. In free text `trigger` begins them; without one, calls
    within text cannot be told from text. `style` is that of the arguments. `alone`: a call ends the output.
    """

    begin: str
    end: str
    before: str = ""
    between: str = ""
    after: str = ""
    trigger: str = ""
    style: str = "template_json"
    alone: bool = False


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """One way to write calls. `silent` markers are dropped, `separators` are characters allowed between two calls.

    `signs`: a chat template that has all strings of one of these teaches the format. `writing`: None where a grammar
    cannot keep to the format.
    """

    name: str
    regions: tuple[Region, ...]
    silent: tuple[str, ...] = ()
    separators: str = ""
    signs: tuple[tuple[str, ...], ...] = ()
    aliases: tuple[str, ...] = ()
    writing: Writing | None = None

    @property
    def markers(self) -> tuple[str, ...]:
        """All literal strings that the parser must see."""
        return (*self.silent, *(mark for item in self.regions for mark in (item.opener, item.closer) if mark))


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """One way to write reasoning. `implied`: an output begins with it even where nothing says so.

    `then` is what models write between their thoughts and what comes next, `answer` what begins an answer.
    """

    name: str
    opener: str
    closers: tuple[str, ...]
    implied: bool = False
    signs: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    then: str = ""
    answer: str = ""

    @property
    def markers(self) -> tuple[str, ...]:
        """All literal strings that the parser must see."""
        return (self.opener, *self.closers)


_Format = TypeVar("_Format", bound=ToolFormat | ReasoningFormat)


def named(table: Iterable[_Format], name: str, option: str) -> _Format:
    """The format of that name in a table. ConfigError names the option and the known ones."""
    formats = tuple(table)
    for item in formats:
        if name == item.name or name in item.aliases:
            return item
    known = sorted(alias for one in formats for alias in (one.name, *one.aliases))
    raise ConfigError(f"{option} is {name!r}, which is not known. Known: {', '.join(known)}.")


def hidden_markers(markers: Iterable[str], special: Iterable[str]) -> bool:
    """Whether any marker has special tokens in it, which a text shows only with skip_special_tokens switched off."""
    tokens = [token for token in special if token]
    return any(token in marker for marker in markers for token in tokens)
